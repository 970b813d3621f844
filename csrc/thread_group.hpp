// Threads that work on one crystal together: one on the host, a block on the device. Code written over a
// group calls these functions in all its threads alike, and its result is the same for any number of them.
#pragma once

#include "geometry.hpp"

namespace mgt {

struct OneThread {
  // Call body(i) for all i < count, in no particular order.
  template <class Body>
  MGT_HOST_DEVICE void for_each(std::int64_t count, const Body& body) const {
    for (std::int64_t i = 0; i < count; ++i) body(i);
  }
  // The greatest of `start` and all of value(i, best), i < count. `best` is a value met before: one that is
  // no greater need not be found exactly.
  template <class T, class Value>
  MGT_HOST_DEVICE T greatest(std::int64_t count, T start, const Value& value) const {
    for (std::int64_t i = 0; i < count; ++i) {
      const T candidate = value(i, start);
      if (candidate > start) start = candidate;
    }
    return start;
  }
  // How many i < count pass the test.
  template <class Test>
  MGT_HOST_DEVICE std::int64_t count(std::int64_t count, const Test& test) const {
    std::int64_t passed = 0;
    for (std::int64_t i = 0; i < count; ++i) passed += test(i);
    return passed;
  }
  // The first i in [begin, end) that passes the test, or end.
  template <class Test>
  MGT_HOST_DEVICE std::int64_t first(std::int64_t begin, std::int64_t end, const Test& test) const {
    while (begin < end && !test(begin)) ++begin;
    return begin;
  }
  // Change a number that the threads share, inside for_each; returns what it was.
  MGT_HOST_DEVICE static std::int32_t exchange(std::int32_t& shared, std::int32_t value) {
    const std::int32_t before = shared;
    shared = value;
    return before;
  }
  MGT_HOST_DEVICE static std::int32_t increment(std::int32_t& shared) { return shared++; }
};

}  // namespace mgt
