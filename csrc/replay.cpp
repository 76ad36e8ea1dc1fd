#include "replay.h"

#include <ATen/ops/empty_ops.h>
#include <ATen/ops/empty_strided_ops.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/Exceptions.h>

#include <array>
#include <mutex>
#include <unordered_map>

#include "checks.h"

namespace fastnorm::replay {
namespace {

namespace py = pybind11;
using c10::DeviceType;

// ---------------------------------------------------------------- plans

// CUlaunchAttribute, CUlaunchConfig and cuLaunchKernelEx: this is compiled where there is no cuda.h.
struct Attribute {
  int id = 6;  // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
  alignas(8) int allowed = 1;
  char rest[60] = {};
};
struct Launched {
  unsigned grid[3], block[3], shared;
  void* stream;
  Attribute* attributes;
  unsigned number;
};
static_assert(sizeof(Attribute) == 72 && sizeof(Launched) == 56);
using Launch = int (*)(const Launched* config, void* function, void** parameters, void** extra);
// aoti_torch_get_current_cuda_stream.
using CurrentStream = int32_t (*)(int32_t device, void** stream);

// The arguments of a function of the contract, of which some are tensors.
constexpr size_t MOST_INPUTS = 9, MOST_OUTPUTS = 3, MOST_PARAMETERS = 48;
// Of each piece of one scratch memory, in bytes: that of torch's own allocations.
constexpr int64_t ALIGNMENT = 512;

int64_t aligned(int64_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

// A number that a kernel or a grid takes: `value`; or, where `per` is not 0, a count of rows, min(value, ceil(M / per)).
struct Number {
  int64_t value, per;
  int64_t of(int64_t M) const { return per == 0 ? value : std::min(value, (M + per - 1) / per); }
};

struct Parameter {
  enum Kind { input, output, scratch, number } kind;
  size_t tensor;
  Number n;  // bytes from the tensor's start, or the number itself, a float's as its bits
};

struct Step {
  uintptr_t function;
  Number programs;
  unsigned threads, shared;
  bool follows;  // may start while the step before ends, and waits for it itself
  std::vector<Parameter> parameters;
};

struct Output {
  std::vector<int64_t> sizes, strides;
  at::ScalarType dtype;
};

// What one kind of call does.
struct Plan {
  std::vector<std::optional<Output>> outputs;
  int64_t scratch;  // bytes
  std::vector<Step> steps;
  bool any_rows;  // serves every number of rows of its power of two
};

// From Python: (outputs, scratch, steps, any_rows), see kernels/plans.py.
Plan read(const py::handle& plan) {
  using Sizes = std::vector<int64_t>;
  using Parameters = std::vector<std::tuple<int, size_t, int64_t, int64_t>>;
  using Launches = std::vector<std::tuple<uintptr_t, std::pair<int64_t, int64_t>, unsigned, unsigned, bool, Parameters>>;
  const auto [outputs, scratch, steps, any_rows] = plan.cast<
      std::tuple<std::vector<std::optional<std::tuple<Sizes, Sizes, at::ScalarType>>>, int64_t, Launches, bool>>();
  Plan p{{}, scratch, {}, any_rows};
  for (const auto& o : outputs) {
    p.outputs.emplace_back();
    if (o) p.outputs.back() = Output{std::get<0>(*o), std::get<1>(*o), std::get<2>(*o)};
  }
  for (const auto& [function, programs, threads, shared, follows, parameters] : steps) {
    TORCH_CHECK(parameters.size() <= MOST_PARAMETERS, "a kernel takes more than ", text(MOST_PARAMETERS), " parameters");
    p.steps.push_back({function, {programs.first, programs.second}, threads, shared, follows, {}});
    for (const auto& [kind, tensor, value, per] : parameters)
      p.steps.back().parameters.push_back({static_cast<Parameter::Kind>(kind), tensor, {value, per}});
  }
  return p;
}

// ---------------------------------------------------------------- what decides a plan

using Key = c10::SmallVector<int64_t, 64>;

struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t h = 0x9E3779B97F4A7C15u;
    for (const int64_t word : key) h = (h ^ static_cast<uint64_t>(word)) * 0xD6E8FEB86659FD93u, h ^= h >> 32;
    return h;
  }
};

int64_t bits(double value) {
  int64_t word;
  std::memcpy(&word, &value, sizeof word);
  return word;
}

int64_t word(MaybeType dtype) { return dtype ? static_cast<int64_t>(*dtype) : -1; }

void append(Key& key, std::initializer_list<int64_t> words) { key.append(words.begin(), words.end()); }

// All of a tensor that a launch depends on but for its address and its sizes and strides.
void append_kind(Key& key, const Tensor& t) {
  const bool whole_vectors = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  append(key, {static_cast<int64_t>(t.scalar_type()) << 1 | int64_t{whole_vectors}});
}

void append(Key& key, const Tensor& t) {
  append_kind(key, t);
  append(key, {t.dim()});
  key.append(t.sizes().begin(), t.sizes().end());
  key.append(t.strides().begin(), t.strides().end());
}

void append(Key& key, const Maybe& t) { t ? append(key, *t) : append(key, {int64_t{-1}}); }

// ---------------------------------------------------------------- calls

enum Function { ROW_FWD, ROW_BWD, CHANNEL_FWD, CHANNEL_BWD, FUNCTIONS };
constexpr const char* NAMES[FUNCTIONS] = {"row_fwd", "row_bwd", "channel_fwd", "channel_bwd"};

struct Device {
  // Of a kind of call. Without any of these it has been seen once.
  struct Entry {
    std::shared_ptr<const Plan> plan;
    bool never = false;  // there is no plan
    bool exact = false;  // there is one for each number of rows
  };
  std::atomic<bool> open{false};
  std::mutex mutex;
  std::unordered_map<Key, Entry, Hash> entries;
  std::atomic<int64_t> replays{0};
  PyObject *functions[FUNCTIONS] = {}, *record = nullptr;
  Launch launch = nullptr;
  CurrentStream stream = nullptr;
};

// Shapes that never come again must not fill the memory.
constexpr size_t MOST_ENTRIES = 4096;

Device& of(DeviceType type) {
  static Device cpu, cuda;  // never given back: backward passes outlive the choice of a backend
  return type == DeviceType::CPU ? cpu : cuda;
}

using Results = std::array<Maybe, MOST_OUTPUTS>;

struct Call {
  Function function;
  const Tensor& x;
  std::array<const Tensor*, MOST_INPUTS> inputs;  // by their place among the arguments
  int64_t M;  // rows, or 0
  Key key;
  bool power;  // the key stands for all numbers of rows in a power of two
};

// Sizes of the results of a plan that serves any number of rows.
struct RowSizes {
  at::IntArrayRef x;
  std::array<int64_t, 2> statistics;  // 2, M
  at::IntArrayRef of(Function f, size_t output, const Output& o) const {
    if (output == 0) return x;
    if (f != ROW_FWD) return o.sizes;
    return output == 1 ? at::IntArrayRef(statistics) : at::IntArrayRef(statistics).slice(1);
  }
};

Tensor empty_on(const Tensor& x, at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::_ops::empty_memory_format::redispatch(x.key_set() & c10::after_ADInplaceOrView_keyset,
                                                   c10::fromIntArrayRefSlow(sizes), dtype, std::nullopt, x.device(),
                                                   std::nullopt, std::nullopt);
}

Tensor empty_on(const Tensor& x, const Output& o) {
  return at::_ops::empty_strided::redispatch(x.key_set() & c10::after_ADInplaceOrView_keyset, c10::fromIntArrayRefSlow(o.sizes),
                                             c10::fromIntArrayRefSlow(o.strides), o.dtype, std::nullopt, x.device(),
                                             std::nullopt);
}

// Starts one kernel; what the driver answered.
int start(const Device& device, const Step& step, const Call& call, const std::array<char*, MOST_OUTPUTS>& outputs,
          char* scratch, void* stream) {
  // Two more than the kernel's own: scratch memory of Triton's, which no kernel that is replayed has.
  std::array<int64_t, MOST_PARAMETERS + 2> values{};
  std::array<void*, MOST_PARAMETERS + 2> parameters;
  const size_t n = step.parameters.size();
  for (size_t i = 0; i < n; ++i) {
    const Parameter& p = step.parameters[i];
    const auto place = [&](const void* base) { return reinterpret_cast<int64_t>(base) + p.n.value; };
    values[i] = p.kind == Parameter::input     ? place(call.inputs[p.tensor]->const_data_ptr())
                : p.kind == Parameter::output  ? place(outputs[p.tensor])
                : p.kind == Parameter::scratch ? place(scratch)
                                               : p.n.of(call.M);
  }
  for (size_t i = 0; i < n + 2; ++i) parameters[i] = &values[i];
  const auto programs = static_cast<unsigned>(step.programs.of(call.M));
  Attribute overlap;
  const Launched config{{programs, 1, 1}, {step.threads, 1, 1}, step.shared, stream, &overlap, step.follows ? 1u : 0u};
  return device.launch(&config, reinterpret_cast<void*>(step.function), parameters.data(), nullptr);
}

// Runs a plan; false, before anything has happened, where the driver does not take the first launch. Results from `kept` on are
// not kept: they stand in scratch memory.
bool run(Device& device, const Plan& plan, const Call& call, size_t kept, Results& results) {
  const c10::DeviceGuard guard(call.x.device());
  std::array<char*, MOST_OUTPUTS> outputs{};
  std::array<int64_t, MOST_OUTPUTS> places{};
  const RowSizes rows{call.x.sizes(), {2, call.M}};
  int64_t bytes = plan.scratch;
  for (size_t i = 0; i < plan.outputs.size(); ++i) {
    const auto& o = plan.outputs[i];
    if (!o) continue;
    const auto sizes = plan.any_rows ? rows.of(call.function, i, *o) : at::IntArrayRef(o->sizes);
    if (i < kept) {
      results[i] = plan.any_rows ? empty_on(call.x, sizes, o->dtype) : empty_on(call.x, *o);
      outputs[i] = static_cast<char*>(results[i]->mutable_data_ptr());
    } else {
      places[i] = aligned(bytes);
      bytes = places[i] + c10::multiply_integers(sizes) * static_cast<int64_t>(c10::elementSize(o->dtype));
    }
  }
  const Tensor memory = bytes > 0 ? empty_on(call.x, bytes, at::kByte) : Tensor();
  char* const scratch = bytes > 0 ? static_cast<char*>(memory.mutable_data_ptr()) : nullptr;
  for (size_t i = kept; i < plan.outputs.size(); ++i) outputs[i] = scratch + places[i];
  void* stream = nullptr;
  if (device.stream != nullptr) TORCH_CHECK(device.stream(call.x.get_device(), &stream) == 0, "there is no current stream");
  for (const Step& step : plan.steps) {
    const int error = start(device, step, call, outputs, scratch, stream);
    if (error != 0 && &step == &plan.steps.front()) return false;
    TORCH_CHECK(error == 0, "a fastnorm kernel could not be launched: CUDA error ", text(error));
  }
  ++device.replays;
  return true;
}

void remember(Device& device, Call& call, const py::handle& plan) {
  Device::Entry entry;
  entry.never = plan.is_none();
  if (!entry.never) entry.plan = std::make_shared<const Plan>(read(plan));
  const std::lock_guard lock(device.mutex);
  if (call.power && entry.plan && !entry.plan->any_rows) {
    device.entries[call.key].exact = true;
    call.key.push_back(call.M);
  }
  device.entries[call.key] = std::move(entry);
}

// The call in Python; with the plan for the next ones, if it is wanted.
template <class Arguments>
Results in_python(Device& device, Call& call, const Arguments& arguments, bool wanted) {
  const py::gil_scoped_acquire gil;
  try {
    const py::tuple answer = py::handle(device.record)(py::handle(device.functions[call.function]), arguments(), wanted);
    if (wanted) remember(device, call, answer[1]);
    Results results;
    const py::tuple given = answer[0];
    for (size_t i = 0; i < given.size(); ++i) results[i] = given[i].cast<Maybe>();
    return results;
  } catch (py::error_already_set& e) {
    e.restore();
    python_error error;  // autograd hands this one on as the Python exception that it is
    error.persist();
    throw error;
  }
}

template <class Arguments>
Results replay(Call& call, size_t kept, const Arguments& arguments) {
  Device& device = of(call.x.device().type());
  std::shared_ptr<const Plan> plan;
  bool wanted = false;
  {
    const std::lock_guard lock(device.mutex);
    if (device.entries.size() >= MOST_ENTRIES) device.entries.clear();
    auto [entry, first] = device.entries.try_emplace(call.key);
    if (entry->second.exact) {
      call.power = false;
      call.key.push_back(call.M);
      std::tie(entry, first) = device.entries.try_emplace(call.key);
    }
    plan = entry->second.plan;
    wanted = !first && !plan && !entry->second.never;
  }
  Results results;
  if (plan && run(device, *plan, call, kept, results)) return results;
  return in_python(device, call, arguments, wanted);
}

constexpr size_t ALL = MOST_OUTPUTS;

const Tensor* pointer(const Maybe& t) { return t ? &*t : nullptr; }

Call begin(Function f, const Tensor& x, std::array<const Tensor*, MOST_INPUTS> inputs) {
  return {f, x, inputs, 0, {static_cast<int64_t>(f), x.get_device()}, false};
}

void append_rows(Call& call, std::initializer_list<const Tensor*> tensors, int64_t M, int64_t N) {
  call.M = M;
  call.power = std::all_of(tensors.begin(), tensors.end(), [](const Tensor* t) { return t->is_contiguous(); });
  append(call.key, {call.power ? int64_t{c10::llvm::Log2_64(static_cast<uint64_t>(M))} : -1, N});
  for (const Tensor* t : tensors) call.power ? append_kind(call.key, *t) : append(call.key, *t);
}

void append(Key& key, const Need& need) {
  append(key, {int64_t{std::get<0>(need)}, word(std::get<1>(need)), word(std::get<2>(need))});
}

}  // namespace

bool serves(DeviceType device) { return (device == DeviceType::CPU || device == DeviceType::CUDA) && of(device).open; }

void serve(DeviceType type, const py::dict& functions, const py::object& record, uintptr_t launch, uintptr_t stream) {
  Device& device = of(type);
  device.open = false;
  for (size_t f = 0; f < FUNCTIONS; ++f) Py_XSETREF(device.functions[f], py::object(functions[NAMES[f]]).release().ptr());
  Py_XSETREF(device.record, Py_NewRef(record.ptr()));
  device.launch = reinterpret_cast<Launch>(launch);
  device.stream = reinterpret_cast<CurrentStream>(stream);
  device.open = true;
}

void close() { of(DeviceType::CPU).open = of(DeviceType::CUDA).open = false; }

void forget() {
  for (const DeviceType type : {DeviceType::CPU, DeviceType::CUDA}) {
    Device& device = of(type);
    const std::lock_guard lock(device.mutex);
    device.entries.clear();
    device.replays = 0;
  }
}

std::tuple<int64_t, int64_t, int64_t> counts(DeviceType type) {
  Device& device = of(type);
  const std::lock_guard lock(device.mutex);
  const auto plans = std::count_if(device.entries.begin(), device.entries.end(), [](const auto& e) { return !!e.second.plan; });
  return {static_cast<int64_t>(device.entries.size()), plans, device.replays};
}

Tensor row_forward(const Tensor& x, const Maybe& weight, const Maybe& bias, double eps, int64_t N, MaybeType dtype,
                   SavedStatistics* saved) {
  Call call = begin(ROW_FWD, x, {&x, pointer(weight), pointer(bias)});
  append_rows(call, {&x}, x.numel() / N, N);
  append(call.key, weight), append(call.key, bias), append(call.key, {bits(eps), word(dtype)});
  Results r = replay(call, saved ? ALL : 1, [&] { return py::make_tuple(x, weight, bias, eps, N, dtype); });
  if (saved) saved->mean = *r[1], saved->rstd = *r[2];
  return *r[0];
}

Grads row_bwd(const Tensor& dy, const Tensor& x, const Maybe& weight, const Tensor& mean, const Tensor& rstd,
              const Need& need) {
  Call call = begin(ROW_BWD, x, {&dy, &x, pointer(weight), &mean, &rstd});
  append_rows(call, {&dy, &x, &mean, &rstd}, rstd.numel(), x.numel() / rstd.numel());
  append(call.key, weight), append(call.key, need);
  Results r = replay(call, ALL, [&] { return py::make_tuple(dy, x, weight, mean, rstd, need); });
  return {r[0], r[1], r[2]};
}

Tensor channel_forward(const Tensor& x, const Maybe& weight, const Maybe& bias, const BatchOptions& o, SavedStatistics* saved) {
  if (o.training)
    for (const Maybe* t : {&o.running_mean, &o.running_var, &o.num_batches_tracked})
      if (*t) (*t)->mutable_data_ptr();  // a lazy clone that is written gets memory of its own
  Call call = begin(CHANNEL_FWD, x, {&x, pointer(weight), pointer(bias), pointer(o.running_mean), pointer(o.running_var),
                                     nullptr, nullptr, nullptr, pointer(o.num_batches_tracked)});
  append(call.key, x);
  for (const Maybe* t : {&weight, &bias, &o.running_mean, &o.running_var, &o.num_batches_tracked}) append(call.key, *t);
  append(call.key, {int64_t{o.training}, bits(o.momentum), bits(o.eps)});
  Results r = replay(call, saved ? ALL : 1, [&] {
    return py::make_tuple(x, weight, bias, o.running_mean, o.running_var, o.training, o.momentum, o.eps,
                          o.num_batches_tracked);
  });
  if (saved) saved->mean = *r[1], saved->rstd = *r[2];
  return *r[0];
}

Grads channel_bwd(const Tensor& dy, const Tensor& x, const Maybe& weight, const Tensor& mean, const Tensor& rstd, bool training,
                  const Need& need) {
  Call call = begin(CHANNEL_BWD, x, {&dy, &x, pointer(weight), &mean, &rstd});
  for (const Tensor* t : {&dy, &x, &mean, &rstd}) append(call.key, *t);
  append(call.key, weight), append(call.key, need), append(call.key, {int64_t{training}});
  Results r = replay(call, ALL, [&] { return py::make_tuple(dy, x, weight, mean, rstd, training, need); });
  return {r[0], r[1], r[2]};
}

}  // namespace fastnorm::replay
