#include "vector_kernels.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define MGT_X86 1
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms inside the header
#endif
#include <immintrin.h>
#endif

namespace mgt {
namespace {

#define MGT_INLINE inline __attribute__((always_inline))

// Written once and compiled for each vector unit.
MGT_INLINE void write_edges(const EdgeTables& given, std::uint32_t i, const std::uint32_t* codes,
                            std::int64_t count, std::int64_t first_atom, std::int64_t first_edge,
                            const EdgeArrays& edges) {
  const EdgeTables tables = given;  // a copy that the edges written cannot be taken to change
  using Double4 = double __attribute__((vector_size(32), may_alias));
  using Integer4 = std::int32_t __attribute__((vector_size(16), may_alias));
  const auto* position = reinterpret_cast<const Double4*>(tables.position);
  const auto* translation = reinterpret_cast<const Double4*>(tables.translation);
  const auto* wrap = reinterpret_cast<const Integer4*>(tables.wrap);
  const auto* shift = reinterpret_cast<const Integer4*>(tables.shift);
  auto* vectors = reinterpret_cast<char*>(edges.vector + first_edge);
  auto* shifts = reinterpret_cast<char*>(edges.shift + first_edge);
  std::int64_t *source = edges.source + first_edge, *target = edges.target + first_edge;
  const Double4 centre = position[i];
  const Integer4 centre_wrap = wrap[i];
  const std::int64_t start = first_atom + i;
  for (std::int64_t e = 0; e < count; ++e) {
    source[e] = start;
    target[e] = first_atom + tables.atom(codes[e]);
  }
  const auto write = [&](std::int64_t e, std::size_t vector_bytes,
                         std::size_t shift_bytes) __attribute__((always_inline)) {
    const std::uint32_t j = tables.atom(codes[e]), m = tables.image(codes[e]);
    const Double4 vector = (position[j] - centre) + translation[m];  // edge_vector, lane by lane
    const Integer4 whole = shift[m] + (wrap[j] - centre_wrap);
    std::memcpy(vectors + e * sizeof(Vec3), &vector, vector_bytes);
    std::memcpy(shifts + e * sizeof(Int3), &whole, shift_bytes);
  };
  // The unused lane goes where the next edge will be written; behind the last may be another thread's.
  for (std::int64_t e = 0; e + 1 < count; ++e) write(e, sizeof(Vec4), sizeof(Int4));
  if (count > 0) write(count - 1, sizeof(Vec3), sizeof(Int3));
}

MGT_INLINE void rank_keys(const std::uint32_t* keys, std::int64_t count, std::uint32_t* rank) {
  for (std::int64_t k = 0; k < count; ++k) {
    const std::uint32_t key = keys[k];
    std::uint32_t less = 0;
    for (std::int64_t n = 0; n < count; ++n) less += keys[n] < key;
    rank[k] = less;
  }
}

std::int64_t list_portable(const Points& translations, std::int64_t images, const float* atom,
                           const float* half, float reach, std::uint32_t code, const NewPoints& points) {
  std::int64_t count = 0;
  for (std::int64_t m = 0; m < images; ++m) {
    const float x = translations.x[m] + atom[0], y = translations.y[m] + atom[1],
                z = translations.z[m] + atom[2];
    const float gap_x = std::max(std::fabs(x) - half[0], 0.0f),
                gap_y = std::max(std::fabs(y) - half[1], 0.0f),
                gap_z = std::max(std::fabs(z) - half[2], 0.0f);
    points.x[count] = x;
    points.y[count] = y;
    points.z[count] = z;
    points.code[count] = code + static_cast<std::uint32_t>(m);
    count += gap_x * gap_x + gap_y * gap_y + gap_z * gap_z <= reach;
  }
  return count;
}

std::int64_t select_portable(const Points& points, std::int64_t begin, std::int64_t end, const float* centre,
                             const Bounds& bounds, std::uint32_t* codes, float* squared,
                             std::int64_t& unsure) {
  std::int64_t count = 0;
  for (std::int64_t k = begin; k < end; ++k) {
    const float dx = points.x[k] - centre[0], dy = points.y[k] - centre[1], dz = points.z[k] - centre[2];
    const float d2 = dx * dx + dy * dy + dz * dz;
    const bool seen = d2 <= bounds.far, apart = d2 > bounds.near;
    codes[count] = points.code[k];
    if (squared) squared[count] = d2;
    count += seen && apart;
    unsure += seen && !(apart && d2 <= bounds.sure);
  }
  return count;
}

void write_portable(const EdgeTables& tables, std::uint32_t i, const std::uint32_t* codes, std::int64_t count,
                    std::int64_t first_atom, std::int64_t first_edge, const EdgeArrays& edges) {
  write_edges(tables, i, codes, count, first_atom, first_edge, edges);
}

void rank_portable(const std::uint32_t* keys, std::int64_t count, std::uint32_t* rank) {
  rank_keys(keys, count, rank);
}

#if defined(MGT_X86)

#define MGT_AVX2 __attribute__((target("avx2,fma,popcnt")))
#define MGT_AVX512 __attribute__((target("avx512f,avx512vl,avx512dq,avx2,fma,popcnt")))

// For each mask of eight lanes: the lanes set, in order.
constexpr auto kCompress = [] {
  std::array<std::array<std::uint8_t, 8>, 256> table{};
  for (int mask = 0; mask < 256; ++mask) {
    int count = 0;
    for (int lane = 0; lane < 8; ++lane) {
      if (mask >> lane & 1) table[mask][count++] = static_cast<std::uint8_t>(lane);
    }
  }
  return table;
}();

MGT_AVX2 inline __m256i compressing(unsigned mask) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kCompress[mask].data())));
}

MGT_AVX2 std::int64_t list_avx2(const Points& translations, std::int64_t images, const float* atom,
                                const float* half, float reach, std::uint32_t code, const NewPoints& points) {
  const __m256 sign = _mm256_set1_ps(-0.0f), zero = _mm256_setzero_ps(), limit = _mm256_set1_ps(reach);
  const __m256 ax = _mm256_set1_ps(atom[0]), ay = _mm256_set1_ps(atom[1]), az = _mm256_set1_ps(atom[2]);
  const __m256 hx = _mm256_set1_ps(half[0]), hy = _mm256_set1_ps(half[1]), hz = _mm256_set1_ps(half[2]);
  const __m256i step = _mm256_set1_epi32(8);
  __m256i codes =
      _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(code)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  std::int64_t count = 0;
  for (std::int64_t m = 0; m < images; m += 8, codes = _mm256_add_epi32(codes, step)) {
    const __m256 x = _mm256_add_ps(_mm256_loadu_ps(translations.x + m), ax);
    const __m256 y = _mm256_add_ps(_mm256_loadu_ps(translations.y + m), ay);
    const __m256 z = _mm256_add_ps(_mm256_loadu_ps(translations.z + m), az);
    const __m256 gx = _mm256_max_ps(_mm256_sub_ps(_mm256_andnot_ps(sign, x), hx), zero);
    const __m256 gy = _mm256_max_ps(_mm256_sub_ps(_mm256_andnot_ps(sign, y), hy), zero);
    const __m256 gz = _mm256_max_ps(_mm256_sub_ps(_mm256_andnot_ps(sign, z), hz), zero);
    const __m256 d2 = _mm256_fmadd_ps(gz, gz, _mm256_fmadd_ps(gy, gy, _mm256_mul_ps(gx, gx)));
    const unsigned lanes = images - m >= 8 ? 0xffu : (1u << (images - m)) - 1;
    const unsigned kept = lanes & _mm256_movemask_ps(_mm256_cmp_ps(d2, limit, _CMP_LE_OQ));
    const __m256i order = compressing(kept);
    _mm256_storeu_ps(points.x + count, _mm256_permutevar8x32_ps(x, order));
    _mm256_storeu_ps(points.y + count, _mm256_permutevar8x32_ps(y, order));
    _mm256_storeu_ps(points.z + count, _mm256_permutevar8x32_ps(z, order));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(points.code + count),
                        _mm256_permutevar8x32_epi32(codes, order));
    count += __builtin_popcount(kept);
  }
  return count;
}

MGT_AVX2 std::int64_t select_avx2(const Points& points, std::int64_t begin, std::int64_t end,
                                  const float* centre, const Bounds& bounds, std::uint32_t* codes,
                                  float* squared, std::int64_t& unsure) {
  const __m256 cx = _mm256_set1_ps(centre[0]), cy = _mm256_set1_ps(centre[1]), cz = _mm256_set1_ps(centre[2]);
  const __m256 near = _mm256_set1_ps(bounds.near), sure = _mm256_set1_ps(bounds.sure),
               far = _mm256_set1_ps(bounds.far);
  const float *x = points.x, *y = points.y, *z = points.z;
  const std::uint32_t* code = points.code;
  std::int64_t count = 0, doubtful = 0;
  for (std::int64_t k = begin; k < end; k += 8) {
    const __m256 dx = _mm256_sub_ps(_mm256_loadu_ps(x + k), cx);
    const __m256 dy = _mm256_sub_ps(_mm256_loadu_ps(y + k), cy);
    const __m256 dz = _mm256_sub_ps(_mm256_loadu_ps(z + k), cz);
    const __m256 d2 = _mm256_fmadd_ps(dz, dz, _mm256_fmadd_ps(dy, dy, _mm256_mul_ps(dx, dx)));
    const unsigned lanes = end - k >= 8 ? 0xffu : (1u << (end - k)) - 1;
    const unsigned seen = lanes & _mm256_movemask_ps(_mm256_cmp_ps(d2, far, _CMP_LE_OQ));
    if (seen == 0) continue;
    const unsigned kept = seen & _mm256_movemask_ps(_mm256_cmp_ps(d2, near, _CMP_GT_OQ));
    const unsigned safe = kept & _mm256_movemask_ps(_mm256_cmp_ps(d2, sure, _CMP_LE_OQ));
    const __m256i order = compressing(kept);
    const __m256i own = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(code + k));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + count), _mm256_permutevar8x32_epi32(own, order));
    if (squared) _mm256_storeu_ps(squared + count, _mm256_permutevar8x32_ps(d2, order));
    count += __builtin_popcount(kept);
    doubtful += __builtin_popcount(seen ^ safe);
  }
  unsure += doubtful;
  return count;
}

MGT_AVX2 void write_avx2(const EdgeTables& tables, std::uint32_t i, const std::uint32_t* codes,
                         std::int64_t count, std::int64_t first_atom, std::int64_t first_edge,
                         const EdgeArrays& edges) {
  write_edges(tables, i, codes, count, first_atom, first_edge, edges);
}

MGT_AVX2 void rank_avx2(const std::uint32_t* keys, std::int64_t count, std::uint32_t* rank) {
  rank_keys(keys, count, rank);
}

MGT_AVX512 std::int64_t list_avx512(const Points& translations, std::int64_t images, const float* atom,
                                    const float* half, float reach, std::uint32_t code,
                                    const NewPoints& points) {
  const __m512 zero = _mm512_setzero_ps(), limit = _mm512_set1_ps(reach);
  const __m512 ax = _mm512_set1_ps(atom[0]), ay = _mm512_set1_ps(atom[1]), az = _mm512_set1_ps(atom[2]);
  const __m512 hx = _mm512_set1_ps(half[0]), hy = _mm512_set1_ps(half[1]), hz = _mm512_set1_ps(half[2]);
  const __m512i step = _mm512_set1_epi32(16);
  __m512i codes = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(code)),
                                   _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  std::int64_t count = 0;
  for (std::int64_t m = 0; m < images; m += 16, codes = _mm512_add_epi32(codes, step)) {
    const __m512 x = _mm512_add_ps(_mm512_loadu_ps(translations.x + m), ax);
    const __m512 y = _mm512_add_ps(_mm512_loadu_ps(translations.y + m), ay);
    const __m512 z = _mm512_add_ps(_mm512_loadu_ps(translations.z + m), az);
    const __m512 gx = _mm512_max_ps(_mm512_sub_ps(_mm512_abs_ps(x), hx), zero);
    const __m512 gy = _mm512_max_ps(_mm512_sub_ps(_mm512_abs_ps(y), hy), zero);
    const __m512 gz = _mm512_max_ps(_mm512_sub_ps(_mm512_abs_ps(z), hz), zero);
    const __m512 d2 = _mm512_fmadd_ps(gz, gz, _mm512_fmadd_ps(gy, gy, _mm512_mul_ps(gx, gx)));
    const auto lanes = static_cast<__mmask16>(images - m >= 16 ? 0xffffu : (1u << (images - m)) - 1);
    const __mmask16 kept = _mm512_mask_cmp_ps_mask(lanes, d2, limit, _CMP_LE_OQ);
    // Compressed in a register: compressing on the way to memory is slow on some machines.
    _mm512_storeu_ps(points.x + count, _mm512_maskz_compress_ps(kept, x));
    _mm512_storeu_ps(points.y + count, _mm512_maskz_compress_ps(kept, y));
    _mm512_storeu_ps(points.z + count, _mm512_maskz_compress_ps(kept, z));
    _mm512_storeu_si512(points.code + count, _mm512_maskz_compress_epi32(kept, codes));
    count += __builtin_popcount(kept);
  }
  return count;
}

MGT_AVX512 std::int64_t select_avx512(const Points& points, std::int64_t begin, std::int64_t end,
                                      const float* centre, const Bounds& bounds, std::uint32_t* codes,
                                      float* squared, std::int64_t& unsure) {
  const __m512 cx = _mm512_set1_ps(centre[0]), cy = _mm512_set1_ps(centre[1]), cz = _mm512_set1_ps(centre[2]);
  const __m512 near = _mm512_set1_ps(bounds.near), sure = _mm512_set1_ps(bounds.sure),
               far = _mm512_set1_ps(bounds.far);
  const float *x = points.x, *y = points.y, *z = points.z;
  const std::uint32_t* code = points.code;
  std::int64_t count = 0, doubtful = 0;
  for (std::int64_t k = begin; k < end; k += 16) {
    const __m512 dx = _mm512_sub_ps(_mm512_loadu_ps(x + k), cx);
    const __m512 dy = _mm512_sub_ps(_mm512_loadu_ps(y + k), cy);
    const __m512 dz = _mm512_sub_ps(_mm512_loadu_ps(z + k), cz);
    const __m512 d2 = _mm512_fmadd_ps(dz, dz, _mm512_fmadd_ps(dy, dy, _mm512_mul_ps(dx, dx)));
    const auto lanes = static_cast<__mmask16>(end - k >= 16 ? 0xffffu : (1u << (end - k)) - 1);
    const __mmask16 seen = _mm512_mask_cmp_ps_mask(lanes, d2, far, _CMP_LE_OQ);
    if (seen == 0) continue;
    const __mmask16 kept = _mm512_mask_cmp_ps_mask(seen, d2, near, _CMP_GT_OQ);
    const __mmask16 safe = _mm512_mask_cmp_ps_mask(kept, d2, sure, _CMP_LE_OQ);
    _mm512_storeu_si512(codes + count, _mm512_maskz_compress_epi32(kept, _mm512_loadu_si512(code + k)));
    if (squared) _mm512_storeu_ps(squared + count, _mm512_maskz_compress_ps(kept, d2));
    count += __builtin_popcount(kept);
    doubtful += __builtin_popcount(seen ^ safe);
  }
  unsure += doubtful;
  return count;
}

MGT_AVX512 void write_avx512(const EdgeTables& tables, std::uint32_t i, const std::uint32_t* codes,
                             std::int64_t count, std::int64_t first_atom, std::int64_t first_edge,
                             const EdgeArrays& edges) {
  write_edges(tables, i, codes, count, first_atom, first_edge, edges);
}

MGT_AVX512 void rank_avx512(const std::uint32_t* keys, std::int64_t count, std::uint32_t* rank) {
  const __m512i one = _mm512_set1_epi32(1);
  for (std::int64_t k = 0; k < count; k += 16) {
    const __m512i own = _mm512_loadu_si512(keys + k);
    __m512i less = _mm512_setzero_si512();
    for (std::int64_t n = 0; n < count; ++n) {
      const __m512i key = _mm512_set1_epi32(static_cast<int>(keys[n]));
      less = _mm512_mask_add_epi32(less, _mm512_cmplt_epu32_mask(key, own), less, one);
    }
    _mm512_storeu_si512(rank + k, less);
  }
}

#endif

// From the narrowest to the widest.
constexpr VectorKernels kKernels[] = {
    {"portable", list_portable, select_portable, write_portable, rank_portable},
#if defined(MGT_X86)
    {"avx2", list_avx2, select_avx2, write_avx2, rank_avx2},
    {"avx512", list_avx512, select_avx512, write_avx512, rank_avx512},
#endif
};

bool runs(const VectorKernels& kernels) {
#if defined(MGT_X86)
  if (std::strcmp(kernels.name, "avx2") == 0) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("popcnt");
  }
  if (std::strcmp(kernels.name, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
  }
#endif
  return std::strcmp(kernels.name, "portable") == 0;
}

const VectorKernels* widest() {
  const VectorKernels* found = kKernels;
  for (const VectorKernels& kernels : kKernels) {
    if (runs(kernels)) found = &kernels;
  }
  return found;
}

std::atomic<const VectorKernels*>& in_use() {
  static std::atomic<const VectorKernels*> kernels{widest()};
  return kernels;
}

}  // namespace

const VectorKernels& vector_kernels() { return *in_use().load(std::memory_order_relaxed); }

bool use_vector_kernels(const char* name) {
  for (const VectorKernels& kernels : kKernels) {
    if (std::strcmp(kernels.name, name) == 0 && runs(kernels)) {
      in_use().store(&kernels);
      return true;
    }
  }
  return false;
}

}  // namespace mgt
