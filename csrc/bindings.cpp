// The Python module mgt_fast._C: checks shapes, releases the GIL, hands vectors over as NumPy arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "comformer.hpp"
#include "crystal_gather.hpp"
#include "lattice_frame.hpp"
#include "neighbor_list.hpp"
#include "vector_kernels.hpp"

namespace py = pybind11;

namespace {

using Shape = std::vector<py::ssize_t>;
template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
void require(const Array<T>& array, const char* name, const Shape& shape) {
  if (Shape(array.shape(), array.shape() + array.ndim()) != shape) {
    throw py::value_error(std::string(name) + " has the wrong shape");
  }
}

// A NumPy array that owns the items; `T` are their numbers.
template <class T, class Items>
py::array_t<T> to_numpy(Items&& items, Shape shape) {
  using Owner = std::decay_t<Items>;
  static_assert(sizeof(*items.data()) % sizeof(T) == 0);
  auto owner = std::make_unique<Owner>(std::move(items));
  const auto* data = reinterpret_cast<const T*>(owner->data());
  py::capsule capsule(owner.get(), [](void* p) { delete static_cast<Owner*>(p); });
  owner.release();
  return py::array_t<T>(std::move(shape), data, capsule);
}

// The arrays of a CrystalBatch, kept alive for the time of a call.
struct Batch {
  Batch(Array<double> frac_coords, Array<double> cell, Array<std::int64_t> batch_ptr, Array<bool> pbc,
        py::sequence names)
      : frac_coords(std::move(frac_coords)),
        cell(std::move(cell)),
        batch_ptr(std::move(batch_ptr)),
        pbc(std::move(pbc)),
        names(std::move(names)) {
    count = static_cast<py::ssize_t>(py::len(this->names));
    require(this->batch_ptr, "batch_ptr", {count + 1});
    require(this->cell, "cell", {count, 3, 3});
    require(this->pbc, "pbc", {count, 3});
    const std::int64_t* ptr = this->batch_ptr.data();
    for (py::ssize_t b = 0; b < count; ++b) {
      if (ptr[b + 1] <= ptr[b]) throw py::value_error("batch_ptr must rise: every crystal has an atom");
    }
    if (ptr[0] != 0) throw py::value_error("batch_ptr must start at 0");
    num_atoms = ptr[count];
    require(this->frac_coords, "frac_coords", {num_atoms, 3});
  }

  mgt::Crystals view() const {
    return {count, batch_ptr.data(), frac_coords.data(), cell.data(), pbc.data()};
  }

  // Run body(crystals) without the GIL; a crystal at fault is named in the ValueError.
  template <class Body>
  auto run(const Body& body) const {
    try {
      const mgt::Crystals crystals = view();
      py::gil_scoped_release release;
      return body(crystals);
    } catch (const mgt::CrystalError& error) {
      throw py::value_error("structure '" + std::string(py::str(names[error.crystal])) +
                            "': " + error.what());
    }
  }

  Array<double> frac_coords, cell;
  Array<std::int64_t> batch_ptr;
  Array<bool> pbc;
  py::sequence names;
  py::ssize_t count, num_atoms;
};

py::dict to_dict(mgt::NeighborList&& list, py::ssize_t num_atoms) {
  const auto num_edges = static_cast<py::ssize_t>(list.edge_vec.size());
  py::dict result;
  result["edge_index"] = to_numpy<std::int64_t>(std::move(list.edge_index), {2, num_edges});
  result["edge_vec"] = to_numpy<double>(std::move(list.edge_vec), {num_edges, 3});
  result["cell_shift"] = to_numpy<std::int32_t>(std::move(list.cell_shift), {num_edges, 3});
  result["row_ptr"] = to_numpy<std::int64_t>(std::move(list.row_ptr), {num_atoms + 1});
  if (!list.shell_margin.empty()) {
    result["shell_margin"] = to_numpy<double>(std::move(list.shell_margin), {num_atoms});
  }
  return result;
}

py::dict neighbor_list(const Batch& batch, double cutoff, std::int64_t max_neighbors, bool half,
                       double shell_tolerance, bool shell_margin, int threads) {
  mgt::NeighborOptions options;
  options.cutoff = cutoff;
  options.max_neighbors = max_neighbors;
  options.half = half;
  options.shell_tolerance = shell_tolerance;
  options.shell_margin = shell_margin;
  options.threads = threads;
  return to_dict(
      batch.run([&](const mgt::Crystals& crystals) { return mgt::neighbor_list(crystals, options); }),
      batch.num_atoms);
}

py::dict crystal_graph(const Batch& batch, const Array<std::int64_t>& numbers, std::int64_t max_neighbors,
                       double shell_tolerance, int threads) {
  require(numbers, "numbers", {batch.num_atoms});
  mgt::NeighborOptions options;
  options.max_neighbors = max_neighbors;
  options.shell_tolerance = shell_tolerance;
  options.threads = threads;
  auto [list, frames] = batch.run([&](const mgt::Crystals& crystals) {
    mgt::NeighborList found = mgt::neighbor_list(crystals, options);
    const mgt::Motif motif{numbers.data(), found.edge_index.data() + found.edge_vec.size(),
                           &found.edge_vec.data()->x, found.row_ptr.data()};
    auto found_frames = mgt::lattice_frames(crystals, motif, threads);
    return std::pair(std::move(found), std::move(found_frames));
  });
  py::dict result = to_dict(std::move(list), batch.num_atoms);
  result["frame"] = to_numpy<double>(std::move(frames), {batch.count, 3, 3});
  return result;
}

py::dict comformer_graph(const Batch& batch, std::int64_t max_neighbors, int threads) {
  mgt::ComformerGraph graph = batch.run(
      [&](const mgt::Crystals& crystals) { return mgt::comformer_graph(crystals, max_neighbors, threads); });
  py::dict result = to_dict(std::move(graph.edges), batch.num_atoms);
  result["frame"] = to_numpy<double>(std::move(graph.frames), {batch.count, 3, 3});
  return result;
}

// The shards of a dataset, whose arrays it keeps alive.
class Reader {
 public:
  using Columns =
      std::tuple<Array<std::int32_t>, Array<std::uint8_t>, Array<double>, Array<double>, Array<std::uint8_t>>;

  explicit Reader(std::vector<Columns> columns) : columns_(std::move(columns)), reader_(shards(columns_)) {}

  py::dict gather(const Array<std::int64_t>& indices) const {
    if (indices.ndim() != 1) throw py::value_error("indices must have one dimension");
    const py::ssize_t count = indices.size();
    for (py::ssize_t b = 0; b < count; ++b) {
      const std::int64_t index = indices.data()[b];
      if (index < 0 || index >= reader_.size()) {
        throw py::index_error("crystal " + std::to_string(index) + " of a dataset of " +
                              std::to_string(reader_.size()));
      }
    }
    mgt::GatheredCrystals batch;
    {
      py::gil_scoped_release release;
      batch = reader_.gather(indices.data(), count);
    }
    const auto atoms = static_cast<py::ssize_t>(batch.numbers.size());
    py::dict result;
    result["numbers"] = to_numpy<std::int64_t>(std::move(batch.numbers), {atoms});
    result["frac_coords"] = to_numpy<double>(std::move(batch.frac_coords), {atoms, 3});
    result["cell"] = to_numpy<double>(std::move(batch.cell), {count, 3, 3});
    result["batch_ptr"] = to_numpy<std::int64_t>(std::move(batch.batch_ptr), {count + 1});
    result["pbc"] = to_numpy<bool>(std::move(batch.pbc), {count, 3});
    return result;
  }

 private:
  static std::vector<mgt::Shard> shards(const std::vector<Columns>& columns) {
    std::vector<mgt::Shard> shards;
    for (const auto& [atom_ptr, numbers, frac_coords, cell, pbc] : columns) {
      const py::ssize_t count = pbc.size(), atoms = numbers.size();
      require(pbc, "pbc", {count});
      require(numbers, "numbers", {atoms});
      require(atom_ptr, "atom_ptr", {count + 1});
      require(frac_coords, "frac_coords", {3 * atoms});
      require(cell, "cell", {9 * count});
      shards.push_back(
          {count, atoms, atom_ptr.data(), numbers.data(), frac_coords.data(), cell.data(), pbc.data()});
    }
    return shards;
  }

  std::vector<Columns> columns_;
  mgt::CrystalReader reader_;
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Periodic neighbour lists, lattice frames and the reader of datasets; mgt_fast.graph and mgt_fast.data "
      "are the documented interface.";
  py::class_<Batch>(m, "Batch")
      .def(py::init<Array<double>, Array<double>, Array<std::int64_t>, Array<bool>, py::sequence>(),
           py::arg("frac_coords").noconvert(), py::arg("cell").noconvert(), py::arg("batch_ptr").noconvert(),
           py::arg("pbc").noconvert(), py::arg("ids"));
  m.def("neighbor_list", &neighbor_list, py::arg("batch"), py::kw_only(), py::arg("cutoff"),
        py::arg("max_neighbors"), py::arg("half"), py::arg("shell_tolerance"), py::arg("shell_margin"),
        py::arg("threads"));
  m.def("crystal_graph", &crystal_graph, py::arg("batch"), py::kw_only(), py::arg("numbers").noconvert(),
        py::arg("max_neighbors"), py::arg("shell_tolerance"), py::arg("threads"));
  m.def("vector_kernels", [] { return mgt::vector_kernels().name; });
  m.def("use_vector_kernels", [](const char* name) {
    if (!mgt::use_vector_kernels(name)) {
      throw py::value_error(std::string("this machine cannot run the vector kernels '") + name + "'");
    }
  });
  py::class_<Reader>(m, "CrystalReader")
      .def(py::init<std::vector<Reader::Columns>>(), py::arg("shards").noconvert())
      .def("gather", &Reader::gather, py::arg("indices").noconvert());
  m.def("comformer_graph", &comformer_graph, py::arg("batch"), py::kw_only(), py::arg("max_neighbors"),
        py::arg("threads"));
}
