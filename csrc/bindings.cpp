// bindings.cpp: the contents of the Python module _core. No other file knows Python.
//
// A tensor crosses as (pointer, dtype, shape, strides), after lobs_native.ops has checked it.
// Arguments become plain structs and the GIL is released. Every operation returns (status, where),
// from which lobs_native.ops makes an exception.
#include <pybind11/native_enum.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
#include "parallel.h"

namespace py = pybind11;

namespace {

using lobs::AnyMatrix;
using lobs::Backend;
using lobs::Index;
using lobs::Info;

AnyMatrix matrix(const py::tuple& tensor) {
    const auto shape = tensor[2].cast<std::pair<Index, Index>>();
    const auto stride = tensor[3].cast<std::pair<Index, Index>>();
    return {reinterpret_cast<void*>(tensor[0].cast<std::uintptr_t>()),
            static_cast<lobs::Dtype>(tensor[1].cast<int>()),
            shape.first,
            shape.second,
            stride.first,
            stride.second};
}

template <typename T>
T* address(std::uintptr_t pointer) {
    return reinterpret_cast<T*>(pointer);
}

std::uintptr_t number(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

// Each layer is (W, A, start, scale, widest).
std::vector<lobs::ColumnLayer> column_layers(const py::list& layers) {
    std::vector<lobs::ColumnLayer> out;
    for (const py::handle each : layers) {
        const auto parts = each.cast<py::tuple>();
        out.push_back({matrix(parts[0].cast<py::tuple>()),
                       address<const void>(parts[1].cast<std::uintptr_t>()),
                       address<const Index>(parts[2].cast<std::uintptr_t>()),
                       parts[3].cast<double>(), parts[4].cast<Index>()});
    }
    return out;
}

// Runs on the calling thread. The exception of a signal handler stays pending.
bool interrupted() {
    py::gil_scoped_acquire held;
    return PyErr_CheckSignals() != 0;
}

const Backend& known_row(const std::string& backend) {
    const Backend* row = lobs::backend_row(backend.c_str());
    if (row == nullptr) throw std::invalid_argument("backend: unknown name '" + backend + "'");
    return *row;
}

template <typename Fn>
Fn* operation(const std::string& backend, Fn* Backend::* column, const char* name,
              const py::object& device) {
    const Backend& row = known_row(backend);
    if (!row.ready)
        throw std::invalid_argument("backend: '" + backend + "' is not ready here (" + row.detail +
                                    ")");
    if (row.device == device.is_none())
        throw std::invalid_argument("device: '" + backend + "' needs " +
                                    (row.device ? "one" : "None"));
    if (row.*column == nullptr)
        throw std::invalid_argument("backend: '" + backend + "' has no " + name);
    return row.*column;
}

// Device memory, allocated by Python: `owner` is a callable from bytes to an address.
void* allocate(void* owner, Index bytes) {
    py::gil_scoped_acquire held;
    try {
        return address<void>((*static_cast<py::function*>(owner))(bytes).cast<std::uintptr_t>());
    } catch (py::error_already_set&) {
        return nullptr;
    }
}

// Runs `call(context)` without the GIL and returns (status, where). `device` is None or (ordinal,
// stream, allocate, report).
template <typename Call>
std::pair<lobs::Status, Index> released(int threads, const py::object& device, Call call) {
    lobs::Context context{threads < 1 ? 1 : threads, &interrupted};
    lobs::Device place{};
    py::function allocator;
    if (!device.is_none()) {
        const auto parts = device.cast<py::tuple>();
        allocator = parts[2].cast<py::function>();
        place = {parts[0].cast<int>(), address<void>(parts[1].cast<std::uintptr_t>()), &allocate,
                 &allocator, address<std::uint64_t>(parts[3].cast<std::uintptr_t>())};
        context.device = &place;
    }
    Info info{lobs::Status::ok, 0};
    {
        py::gil_scoped_release free;
        info = call(context);
    }
    if (info.status == lobs::Status::interrupted && PyErr_Occurred() != nullptr)
        throw py::error_already_set();
    return {info.status, info.where};
}

void add_types(py::module_& module) {
    using lobs::AdmmPlan, lobs::ColumnsPlan, lobs::Dtype, lobs::ExactPlan, lobs::Status,
        lobs::WeightState;
    py::native_enum<Dtype>(module, "Dtype", "enum.IntEnum", "Type of a tensor's elements.")
        .value("F64", Dtype::f64)
        .value("F32", Dtype::f32)
        .value("F16", Dtype::f16)
        .value("BF16", Dtype::bf16)
        .finalize();
    py::native_enum<Status>(module, "Status", "enum.IntEnum", "How a native call ended.")
        .value("OK", Status::ok)
        .value("NOT_FINITE", Status::not_finite)
        .value("NOT_POSITIVE", Status::not_positive)
        .value("OUT_OF_MEMORY", Status::out_of_memory)
        .value("INTERRUPTED", Status::interrupted)
        .value("UNSUPPORTED", Status::unsupported)
        .value("BAD_ORDER", Status::bad_order)
        .value("DEVICE_FAILED", Status::device_failed)
        .finalize();
    py::native_enum<WeightState>(module, "WeightState", "enum.IntEnum",
                                 "What may happen to a weight.")
        .value("MAY_GO", WeightState::may_go)
        .value("GOES_FIRST", WeightState::goes_first)
        .value("STAYS", WeightState::stays)
        .finalize();

    const auto plan = [](Index limit, double stop, double floor, Index block, Index group,
                         Index per_group, bool update) {
        return ExactPlan{limit, stop, floor, block, group, per_group, update};
    };
    py::class_<ExactPlan>(module, "ExactPlan", "Settings of exact_trace: see csrc/exact.h.")
        .def(py::init(plan), py::kw_only(), py::arg("limit"), py::arg("stop"), py::arg("floor"),
             py::arg("block"), py::arg("group"), py::arg("per_group"), py::arg("update"))
        .def_readonly("limit", &ExactPlan::limit)
        .def_readonly("stop", &ExactPlan::stop)
        .def_readonly("floor", &ExactPlan::floor)
        .def_readonly("block", &ExactPlan::block)
        .def_readonly("group", &ExactPlan::group)
        .def_readonly("per_group", &ExactPlan::per_group)
        .def_readonly("update", &ExactPlan::update);

    const auto admm_plan = [](Index count, Index unit, Index group, Index per_group, bool by_row,
                              double cut) {
        return AdmmPlan{count, unit, group, per_group, by_row, cut};
    };
    py::class_<AdmmPlan>(module, "AdmmPlan", "Settings of admm_step: see csrc/admm.h.")
        .def(py::init(admm_plan), py::kw_only(), py::arg("count"), py::arg("unit"),
             py::arg("group"), py::arg("per_group"), py::arg("by_row"), py::arg("cut"))
        .def_readonly("count", &AdmmPlan::count)
        .def_readonly("unit", &AdmmPlan::unit)
        .def_readonly("group", &AdmmPlan::group)
        .def_readonly("per_group", &AdmmPlan::per_group)
        .def_readonly("by_row", &AdmmPlan::by_row)
        .def_readonly("cut", &AdmmPlan::cut);

    const auto columns_plan = [](Index units, Index done, Index limit, double floor,
                                 std::uintptr_t first, Index sets, std::uintptr_t set_start,
                                 std::uintptr_t set_unit) {
        return ColumnsPlan{units,
                           done,
                           limit,
                           floor,
                           address<const double>(first),
                           sets,
                           address<const Index>(set_start),
                           address<const std::int32_t>(set_unit)};
    };
    py::class_<ColumnsPlan>(module, "ColumnsPlan", "Settings of columns_trace: see csrc/columns.h.")
        .def(py::init(columns_plan), py::kw_only(), py::arg("units"), py::arg("done"),
             py::arg("limit"), py::arg("floor"), py::arg("first"), py::arg("sets"),
             py::arg("set_start"), py::arg("set_unit"))
        .def_readonly("units", &ColumnsPlan::units)
        .def_readonly("done", &ColumnsPlan::done)
        .def_readonly("limit", &ColumnsPlan::limit)
        .def_readonly("floor", &ColumnsPlan::floor)
        .def_property_readonly("first", [](const ColumnsPlan& p) { return number(p.first); })
        .def_readonly("sets", &ColumnsPlan::sets)
        .def_property_readonly("set_start",
                               [](const ColumnsPlan& p) { return number(p.set_start); })
        .def_property_readonly("set_unit", [](const ColumnsPlan& p) { return number(p.set_unit); });
}

}  // namespace

PYBIND11_MODULE(_core, module) {
    module.doc() = "Native kernels of lobs_native. Call them through lobs_native.ops.";
    module.attr("__version__") = LOBS_VERSION;
    module.attr("parallel_runtime") = lobs::parallel_runtime();
    module.attr("MAX_BLOCK") = lobs::kMaxBlock;
    add_types(module);

    module.def("backends", [] {
        int count = 0;
        const Backend* rows = lobs::backend_rows(&count);
        py::list out;
        for (int i = 0; i < count; ++i)
            out.append(py::make_tuple(rows[i].name, rows[i].ready, rows[i].detail, rows[i].device));
        return out;
    });

    module.def(
        "load_backend",
        [](const std::string& file) {
            const char* why = "";
            const char* name = lobs::backend_load(file.c_str(), &why);
            if (name == nullptr) throw std::invalid_argument(std::string("file: ") + why);
            return std::string(name);
        },
        py::arg("file"));

    module.def(
        "resolve",
        [](const std::string& backend) -> py::object {
            const Backend* row = lobs::backend_row(backend.c_str());
            return row == nullptr ? py::object(py::none()) : py::object(py::str(row->name));
        },
        py::arg("backend"));

    module.def(
        "has",
        [](const std::string& backend, const std::string& operation) {
            bool known = false;
            const bool has = lobs::backend_has(known_row(backend), operation.c_str(), &known);
            if (!known) throw std::invalid_argument("operation: unknown name '" + operation + "'");
            return has;
        },
        py::arg("backend"), py::arg("operation"));

    module.def(
        "info_of",
        [](Index report) {
            const Info info = lobs::info_of(static_cast<std::uint64_t>(report));
            return std::pair{info.status, info.where};
        },
        py::arg("report"));

    module.def(
        "hessian_accumulate",
        [](const std::string& backend, const py::tuple& H, const py::tuple& X, std::uintptr_t t,
           bool ones, int threads, const py::object& device) {
            auto* run =
                operation(backend, &Backend::hessian_accumulate, "hessian_accumulate", device);
            const AnyMatrix h = matrix(H), x = matrix(X);
            return released(threads, device, [&](const lobs::Context& c) {
                return run(h, x, address<const double>(t), ones, c);
            });
        },
        py::arg("backend"), py::arg("H"), py::arg("X"), py::arg("t"), py::arg("ones"),
        py::arg("threads"), py::arg("device") = py::none());

    module.def(
        "inverse_update",
        [](const std::string& backend, std::uintptr_t F, lobs::Dtype dtype, Index blocks, Index B,
           const py::tuple& G, double m, int threads, const py::object& device) {
            auto* run = operation(backend, &Backend::inverse_update, "inverse_update", device);
            const AnyMatrix g = matrix(G);
            return released(threads, device, [&](const lobs::Context& c) {
                return run(address<void>(F), dtype, blocks, B, g, m, c);
            });
        },
        py::arg("backend"), py::arg("F"), py::arg("dtype"), py::arg("blocks"), py::arg("B"),
        py::arg("G"), py::arg("m"), py::arg("threads"), py::arg("device") = py::none());

    module.def(
        "saliency_argmin",
        [](const std::string& backend, std::uintptr_t column, std::uintptr_t value,
           const py::tuple& W, const py::tuple& diag, const py::tuple& live, int threads,
           const py::object& device) {
            auto* run = operation(backend, &Backend::saliency_argmin, "saliency_argmin", device);
            const AnyMatrix w = matrix(W), d = matrix(diag), l = matrix(live);
            const lobs::Matrix<const unsigned char> alive{static_cast<const unsigned char*>(l.data),
                                                          l.rows, l.columns, l.row_stride,
                                                          l.column_stride};
            return released(threads, device, [&](const lobs::Context& c) {
                return run(address<Index>(column), address<void>(value), w, d, alive, c);
            });
        },
        py::arg("backend"), py::arg("column"), py::arg("value"), py::arg("W"), py::arg("diag"),
        py::arg("live"), py::arg("threads"), py::arg("device") = py::none());

    module.def(
        "static_order_prune",
        [](const std::string& backend, const py::tuple& W, std::uintptr_t A, std::uintptr_t order,
           std::uintptr_t start, int threads, const py::object& device) {
            auto* run =
                operation(backend, &Backend::static_order_prune, "static_order_prune", device);
            const AnyMatrix w = matrix(W);
            return released(threads, device, [&](const lobs::Context& c) {
                return run(w, address<const void>(A), address<const std::int32_t>(order),
                           address<const Index>(start), c);
            });
        },
        py::arg("backend"), py::arg("W"), py::arg("A"), py::arg("order"), py::arg("start"),
        py::arg("threads"), py::arg("device") = py::none());

    module.def(
        "rank_lowest",
        [](const std::string& backend, std::uintptr_t chosen, std::uintptr_t score, Index rows,
           Index columns, Index count, int threads, const py::object& device) {
            auto* run = operation(backend, &Backend::rank_lowest, "rank_lowest", device);
            return released(threads, device, [&](const lobs::Context& c) {
                return run(address<unsigned char>(chosen), address<const double>(score), rows,
                           columns, count, c);
            });
        },
        py::arg("backend"), py::arg("chosen"), py::arg("score"), py::arg("rows"),
        py::arg("columns"), py::arg("count"), py::arg("threads"), py::arg("device") = py::none());

    module.def(
        "rank_rows",
        [](const std::string& backend, std::uintptr_t order, std::uintptr_t start,
           std::uintptr_t chosen, std::uintptr_t score, Index rows, Index columns, int threads,
           const py::object& device) {
            auto* run = operation(backend, &Backend::rank_rows, "rank_rows", device);
            return released(threads, device, [&](const lobs::Context& c) {
                return run(address<std::int32_t>(order), address<const Index>(start),
                           address<const unsigned char>(chosen), address<const double>(score), rows,
                           columns, c);
            });
        },
        py::arg("backend"), py::arg("order"), py::arg("start"), py::arg("chosen"), py::arg("score"),
        py::arg("rows"), py::arg("columns"), py::arg("threads"), py::arg("device") = py::none());

    module.def(
        "exact_trace",
        [](const std::string& backend, std::uintptr_t order, std::uintptr_t loss,
           std::uintptr_t count, std::uintptr_t lost, const py::tuple& W, std::uintptr_t A,
           std::uintptr_t state, const lobs::ExactPlan& plan, int threads,
           const py::object& device) {
            auto* run = operation(backend, &Backend::exact_trace, "exact_trace", device);
            const AnyMatrix w = matrix(W);
            const lobs::ExactOut out{address<std::int32_t>(order), address<void>(loss),
                                     address<Index>(count), address<unsigned char>(lost)};
            return released(threads, device, [&](const lobs::Context& c) {
                return run(out, w, address<const void>(A), address<const unsigned char>(state),
                           plan, c);
            });
        },
        py::arg("backend"), py::arg("order"), py::arg("loss"), py::arg("count"), py::arg("lost"),
        py::arg("W"), py::arg("A"), py::arg("state"), py::arg("plan"), py::arg("threads"),
        py::arg("device") = py::none());

    module.def(
        "exact_bytes",
        [](const std::string& backend, lobs::Dtype dtype, Index columns,
           const lobs::ExactPlan& plan) {
            const Backend& row = known_row(backend);
            if (row.exact_bytes == nullptr)
                throw std::invalid_argument("backend: '" + backend + "' has no exact_bytes");
            return row.exact_bytes(dtype, columns, plan);
        },
        py::arg("backend"), py::arg("dtype"), py::arg("columns"), py::arg("plan"));

    module.def(
        "support_solve",
        [](const std::string& backend, const py::tuple& X, std::uintptr_t M, std::uintptr_t chosen,
           int threads, const py::object& device) {
            auto* run = operation(backend, &Backend::support_solve, "support_solve", device);
            const AnyMatrix x = matrix(X);
            return released(threads, device, [&](const lobs::Context& c) {
                return run(x, address<const void>(M), address<const unsigned char>(chosen), c);
            });
        },
        py::arg("backend"), py::arg("X"), py::arg("M"), py::arg("chosen"), py::arg("threads"),
        py::arg("device") = py::none());

    module.def(
        "exchange",
        [](const std::string& backend, std::uintptr_t kept, std::uintptr_t swaps,
           std::uintptr_t left, const py::tuple& W, std::uintptr_t A, std::uintptr_t fixed,
           Index group, Index limit, int threads, const py::object& device) {
            auto* run = operation(backend, &Backend::exchange, "exchange", device);
            const AnyMatrix w = matrix(W);
            const lobs::ExchangeOut out{address<unsigned char>(kept), address<Index>(swaps),
                                        address<double>(left)};
            return released(threads, device, [&](const lobs::Context& c) {
                return run(out, w, address<const double>(A), address<const unsigned char>(fixed),
                           group, limit, c);
            });
        },
        py::arg("backend"), py::arg("kept"), py::arg("swaps"), py::arg("left"), py::arg("W"),
        py::arg("A"), py::arg("fixed"), py::arg("group"), py::arg("limit"), py::arg("threads"),
        py::arg("device") = py::none());

    module.def(
        "sweep_block",
        [](const std::string& backend, const py::tuple& W, const py::tuple& U, std::uintptr_t gone,
           const py::tuple& E, Index group, Index per_group, int threads,
           const py::object& device) {
            auto* run = operation(backend, &Backend::sweep_block, "sweep_block", device);
            const AnyMatrix w = matrix(W), u = matrix(U), e = matrix(E);
            return released(threads, device, [&](const lobs::Context& c) {
                return run(w, u, address<unsigned char>(gone), e, group, per_group, c);
            });
        },
        py::arg("backend"), py::arg("W"), py::arg("U"), py::arg("gone"), py::arg("E"),
        py::arg("group"), py::arg("per_group"), py::arg("threads"), py::arg("device") = py::none());

    module.def(
        "admm_step",
        [](const std::string& backend, std::uintptr_t changed, std::uintptr_t cut,
           const py::tuple& p, const py::tuple& d, const py::tuple& x, std::uintptr_t removed,
           std::uintptr_t state, const lobs::AdmmPlan& plan, int threads,
           const py::object& device) {
            auto* run = operation(backend, &Backend::admm_step, "admm_step", device);
            const AnyMatrix product = matrix(p), now = matrix(d), original = matrix(x);
            return released(threads, device, [&](const lobs::Context& c) {
                return run(address<Index>(changed), address<double>(cut), product, now, original,
                           address<unsigned char>(removed), address<const unsigned char>(state),
                           plan, c);
            });
        },
        py::arg("backend"), py::arg("changed"), py::arg("cut"), py::arg("p"), py::arg("d"),
        py::arg("x"), py::arg("removed"), py::arg("state"), py::arg("plan"), py::arg("threads"),
        py::arg("device") = py::none());

    module.def(
        "conjugate_step",
        [](const std::string& backend, const py::tuple& w, const py::tuple& g, const py::tuple& p,
           const py::tuple& h, std::uintptr_t removed, std::uintptr_t rr, int threads,
           const py::object& device) {
            auto* run = operation(backend, &Backend::conjugate_step, "conjugate_step", device);
            const AnyMatrix weights = matrix(w), gradient = matrix(g), direction = matrix(p),
                            product = matrix(h);
            return released(threads, device, [&](const lobs::Context& c) {
                return run(weights, gradient, direction, product,
                           address<const unsigned char>(removed), address<double>(rr), c);
            });
        },
        py::arg("backend"), py::arg("w"), py::arg("g"), py::arg("p"), py::arg("h"),
        py::arg("removed"), py::arg("rr"), py::arg("threads"), py::arg("device") = py::none());

    module.def(
        "columns_trace",
        [](const std::string& backend, std::uintptr_t order, std::uintptr_t cost,
           std::uintptr_t count, const py::list& layers, const lobs::ColumnsPlan& plan,
           std::uintptr_t memory, int threads, const py::object& device) {
            auto* run = operation(backend, &Backend::columns_trace, "columns_trace", device);
            const auto all = column_layers(layers);
            const lobs::ColumnsOut out{address<std::int32_t>(order), address<double>(cost),
                                       address<Index>(count)};
            return released(threads, device, [&](const lobs::Context& c) {
                return run(out, all.data(), static_cast<Index>(all.size()), plan,
                           address<void>(memory), c);
            });
        },
        py::arg("backend"), py::arg("order"), py::arg("cost"), py::arg("count"), py::arg("layers"),
        py::arg("plan"), py::arg("memory"), py::arg("threads"), py::arg("device") = py::none());

    module.def(
        "columns_bytes",
        [](const std::string& backend, const py::list& layers, Index units, Index sets) {
            const Backend& row = known_row(backend);
            if (row.columns_bytes == nullptr)
                throw std::invalid_argument("backend: '" + backend + "' has no columns_bytes");
            const auto all = column_layers(layers);
            return row.columns_bytes(all.data(), static_cast<Index>(all.size()), units, sets);
        },
        py::arg("backend"), py::arg("layers"), py::arg("units"), py::arg("sets"));

    module.def(
        "sliced_linear",
        [](const std::string& backend, const py::tuple& y, const py::tuple& x,
           std::uintptr_t values, lobs::Dtype dtype, std::uintptr_t columns, std::uintptr_t steps,
           std::uintptr_t start, Index width, std::uintptr_t bias, int threads,
           const py::object& device) {
            auto* run = operation(backend, &Backend::sliced_linear, "sliced_linear", device);
            const AnyMatrix out = matrix(y), in = matrix(x);
            const lobs::SlicedWeight weight{address<const void>(values),
                                            dtype,
                                            address<const unsigned char>(columns),
                                            address<const unsigned char>(steps),
                                            address<const Index>(start),
                                            out.columns,
                                            width};
            return released(threads, device, [&](const lobs::Context& c) {
                return run(out, in, weight, address<const float>(bias), c);
            });
        },
        py::arg("backend"), py::arg("y"), py::arg("x"), py::arg("values"), py::arg("dtype"),
        py::arg("columns"), py::arg("steps"), py::arg("start"), py::arg("width"), py::arg("bias"),
        py::arg("threads"), py::arg("device") = py::none());
}
