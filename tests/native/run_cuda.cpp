// Runs operations of harmonizer::cuda on cases read from a file and writes what they give to
// another: what tests/cuda_on_host.py builds and speaks to.
//
//   run_cuda CASES RESULTS
//
// Both files: a count (all numbers are int64), then for each case its text, its options, its
// arrays. A text is its length and its bytes; options are a count, then name and number of each;
// arrays are a count, then of each its name, dtype, number of dimensions, sizes, strides, distance
// in bytes from an aligned address, number of bytes, and these. The text of a case is the
// operation, that of a result what went wrong, if anything.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/loss_general.cuh"

using namespace harmonizer;

// Where the kernels run as PTX, the interpreter is told what memory they may access.
extern "C" __attribute__((weak)) void ptx_register_memory(const void* address, uint64_t bytes);
extern "C" __attribute__((weak)) void ptx_forget_memory(const void* address);

namespace {

constexpr size_t kAlignment = 256;  // of what an allocator of device memory returns

// Exactly as large as asked for, so that AddressSanitizer sees the byte behind it, and full of NaN,
// so that what was never written shows.
class Buffer {
 public:
  Buffer(size_t bytes, size_t offset = 0) : bytes_(bytes), offset_(offset) {
    void* memory = nullptr;
    if (posix_memalign(&memory, kAlignment, offset + bytes) != 0) throw std::bad_alloc();
    memory_.reset(static_cast<char*>(memory));
    if (offset + bytes > 0) std::memset(memory, 0xff, offset + bytes);
    if (ptx_register_memory != nullptr) ptx_register_memory(data(), bytes_);
  }
  ~Buffer() {
    if (ptx_forget_memory != nullptr) ptx_forget_memory(data());
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  char* data() const { return memory_.get() + offset_; }
  size_t bytes() const { return bytes_; }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t bytes_, offset_;
};

size_t bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

struct Array {
  Dtype dtype;
  std::vector<int64_t> sizes, strides;
  std::shared_ptr<Buffer> buffer;
};

struct Case {
  std::string text;
  std::map<std::string, int64_t> options;
  std::map<std::string, Array> arrays;

  int64_t option(const char* name) const {
    const auto found = options.find(name);
    if (found == options.end()) throw std::runtime_error(std::string("no option ") + name);
    return found->second;
  }
  bool has(const std::string& name) const { return arrays.count(name) != 0; }
  const Array& array(const std::string& name) const {
    const auto found = arrays.find(name);
    if (found == arrays.end()) throw std::runtime_error("no array " + name);
    return found->second;
  }
  const void* data(const std::string& name) const { return array(name).buffer->data(); }
  // (B, C, H, W), or (B, H, W) without a stride of channels.
  Maps maps(const std::string& name) const {
    const Array& a = array(name);
    const size_t last = a.sizes.size();
    return {a.buffer->data(),    a.dtype,
            a.strides[0],        last == 4 ? a.strides[1] : 0,
            a.strides[last - 2], a.strides[last - 1]};
  }
};

// A dense array that an operation writes.
void* output(Case& result, const std::string& name, Dtype dtype, std::vector<int64_t> sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t count = 1;
  for (size_t i = sizes.size(); i-- > 0; count *= sizes[i]) strides[i] = count;
  auto buffer = std::make_shared<Buffer>(count * bytes_of(dtype));
  void* data = buffer->data();
  result.arrays[name] = {dtype, std::move(sizes), std::move(strides), std::move(buffer)};
  return data;
}

template <class Params>
void call(Params& p, size_t (*workspace_bytes)(const Params&), void (*operation)(const Params&)) {
  const Buffer workspace(workspace_bytes(p));
  p.workspace = workspace.data();
  operation(p);
}

template <class Params>
void set_sizes(Params& p, const std::vector<int64_t>& sizes) {
  p.batch = sizes[0];
  p.channels = sizes[1];
  p.height = sizes[2];
  p.width = sizes[3];
}

void loss(const Case& c, Case& result) {
  LossParams p;
  const Array& saliency = c.array("saliency");
  set_sizes(p, saliency.sizes);
  p.levels = static_cast<int32_t>(c.option("levels"));
  p.formulation = static_cast<Formulation>(c.option("formulation"));
  p.distance = static_cast<Distance>(c.option("distance"));
  p.variant = static_cast<int32_t>(c.option("variant"));
  p.prefetch = static_cast<int32_t>(c.option("prefetch"));
  p.saliency = c.maps("saliency");
  p.heatmaps = c.maps("heatmaps");
  p.weights = c.data("weights");
  p.rows = output(result, "rows", Dtype::float32, {p.batch});
  p.saliency_std = output(result, "saliency_std", Dtype::float32, {p.batch});
  if (c.option("with_gradient"))
    p.gradient = output(result, "gradient", saliency.dtype, {p.batch, 1, p.height, p.width});
  call(p, cuda::loss_workspace_bytes, cuda::loss);
}

void pyramid(const Case& c, Case& result) {
  PyramidParams p;
  const Array& maps = c.array("maps");
  set_sizes(p, maps.sizes);
  p.levels = static_cast<int32_t>(c.option("levels"));
  p.maps = c.maps("maps");
  int64_t height = p.height, width = p.width;
  for (int level = 1; level < p.levels; ++level) {
    height = (height + 1) / 2;
    width = (width + 1) / 2;
    p.outputs[level] = output(result, "level" + std::to_string(level), maps.dtype,
                              {p.batch, p.channels, height, width});
  }
  call(p, cuda::pyramid_workspace_bytes, cuda::pyramid);
}

void pyramid_adjoint(const Case& c, Case& result) {
  PyramidAdjointParams p;
  const Array& first = c.array("gradient1");
  set_sizes(p, {first.sizes[0], first.sizes[1], c.option("height"), c.option("width")});
  for (p.levels = 1; c.has("gradient" + std::to_string(p.levels)); ++p.levels)
    p.gradients[p.levels] = c.maps("gradient" + std::to_string(p.levels));
  p.output = output(result, "output", first.dtype, {p.batch, p.channels, p.height, p.width});
  call(p, cuda::pyramid_adjoint_workspace_bytes, cuda::pyramid_adjoint);
}

void standardize(const Case& c, Case& result) {
  StandardizeParams p;
  const Array& maps = c.array("maps");
  set_sizes(p, maps.sizes);
  p.maps = c.maps("maps");
  if (c.has("grad")) p.grad = c.maps("grad");
  p.output = output(result, "output", maps.dtype, maps.sizes);
  call(p, cuda::standardize_workspace_bytes, cuda::standardize);
}

void positive_part_mse(const Case& c, Case& result) {
  PositivePartMseParams p;
  const Array &a = c.array("a"), &b = c.array("b");
  p.batch = a.sizes[0];
  p.height = a.sizes[1];
  p.width = a.sizes[2];
  p.a = c.maps("a");
  p.b = c.maps("b");
  if (c.has("grad")) {
    p.grad = c.data("grad");
    p.grad_a = output(result, "grad_a", a.dtype, a.sizes);
    p.grad_b = output(result, "grad_b", b.dtype, b.sizes);
  } else {
    p.rows = output(result, "rows", Dtype::float32, {p.batch});
  }
  call(p, cuda::positive_part_mse_workspace_bytes, cuda::positive_part_mse);
}

// The specializations of the loss, each as an option "name size formulation cluster threads bytes".
void variants(const Case&, Case& result) {
  for (int32_t number = 1;; ++number) {
    const cuda::LossVariant v = cuda::loss_variant(number);
    if (v.name == nullptr) return;
    result
        .options[std::string(v.name) + " " + std::to_string(v.size) + " " +
                 std::to_string(static_cast<int>(v.formulation)) + " " + std::to_string(v.cluster) +
                 " " + std::to_string(v.threads) + " " + std::to_string(v.shared_bytes)] = number;
  }
}

// What the general path of the loss would launch for maps of a size, without them.
void plan(const Case& c, Case& result) {
  LossParams p;
  p.batch = c.option("batch");
  p.channels = 3;
  p.height = c.option("height");
  p.width = c.option("width");
  p.levels = static_cast<int32_t>(c.option("levels"));
  p.formulation = static_cast<Formulation>(c.option("formulation"));
  const int64_t pixels = p.height * p.width;
  p.saliency = {nullptr, Dtype::float32, 3 * pixels, pixels, p.width, 1};
  p.heatmaps = {nullptr, Dtype::float32, pixels, 0, p.width, 1};
  p.gradient = &p;  // never written: it only says that there will be one
  const cuda::DeviceLimits& limits = cuda::device_limits(0);
  const cuda::GeneralPlan general = cuda::general_plan(p, limits);
  int64_t blocks = general.slabs;
  for (int l = 0; l < general.first; ++l) {
    const cuda::LevelPlan& level = general.levels[l];
    blocks = std::max<int64_t>({blocks, level.down.blocks, level.up.blocks});
    const int64_t coarse = cuda::halved(level.height), groups = level.down.groups;
    const std::string name = "level " + std::to_string(l) + " uncovered ";
    const auto left = [](int64_t wanted, int64_t made) {
      return std::max<int64_t>(wanted - made, 0);
    };
    result.options[name + "rows down"] =
        left(coarse, int64_t{level.down.strips} * level.down.strip_rows);
    result.options[name + "columns down"] =
        left(groups, int64_t{level.down.tiles} * level.down.tile_groups);
    result.options[name + "rows up"] = left(coarse, int64_t{level.up.strips} * level.up.strip_rows);
    result.options[name + "columns up"] = left(level.width, 4 * int64_t{level.up.groups});
  }
  result.options["uncovered pixels"] =
      std::max<int64_t>(pixels - int64_t{general.slab} * general.slabs, 0);
  result.options["samples"] = general.chunk;
  result.options["blocks"] = blocks * general.chunk;
  result.options["shared_bytes"] = static_cast<int64_t>(general.coarse_bytes);
  result.options["shared_limit"] = limits.shared_bytes;
  result.options["workspace_bytes"] =
      static_cast<int64_t>(cuda::general_workspace_bytes(p, limits));
}

Case run(const Case& c) {
  static const std::map<std::string, void (*)(const Case&, Case&)> operations = {
      {"loss", loss},
      {"pyramid", pyramid},
      {"pyramid_adjoint", pyramid_adjoint},
      {"standardize", standardize},
      {"positive_part_mse", positive_part_mse},
      {"variants", variants},
      {"plan", plan},
  };
  Case result;
  try {
    operations.at(c.text)(c, result);
  } catch (const std::exception& error) {
    result = Case();
    result.text = error.what();
  }
  return result;
}

// --- the files ----------------------------------------------------------------------------------

int64_t read_number(std::istream& in) {
  int64_t number = 0;
  in.read(reinterpret_cast<char*>(&number), sizeof number);
  if (!in) throw std::runtime_error("the file of cases ends too early");
  return number;
}
std::string read_text(std::istream& in) {
  std::string text(read_number(in), '\0');
  in.read(text.data(), static_cast<std::streamsize>(text.size()));
  return text;
}
Case read_case(std::istream& in) {
  Case c;
  c.text = read_text(in);
  for (int64_t i = read_number(in); i > 0; --i) {
    const std::string name = read_text(in);
    c.options[name] = read_number(in);
  }
  for (int64_t i = read_number(in); i > 0; --i) {
    Array& a = c.arrays[read_text(in)];
    a.dtype = static_cast<Dtype>(read_number(in));
    a.sizes.resize(read_number(in));
    a.strides.resize(a.sizes.size());
    for (int64_t& size : a.sizes) size = read_number(in);
    for (int64_t& stride : a.strides) stride = read_number(in);
    const int64_t offset = read_number(in);
    a.buffer = std::make_shared<Buffer>(read_number(in), offset);
    in.read(a.buffer->data(), static_cast<std::streamsize>(a.buffer->bytes()));
  }
  return c;
}

void write_number(std::ostream& out, int64_t number) {
  out.write(reinterpret_cast<const char*>(&number), sizeof number);
}
void write_text(std::ostream& out, const std::string& text) {
  write_number(out, static_cast<int64_t>(text.size()));
  out << text;
}
void write_case(std::ostream& out, const Case& c) {
  write_text(out, c.text);
  write_number(out, static_cast<int64_t>(c.options.size()));
  for (const auto& [name, number] : c.options) {
    write_text(out, name);
    write_number(out, number);
  }
  write_number(out, static_cast<int64_t>(c.arrays.size()));
  for (const auto& [name, a] : c.arrays) {
    write_text(out, name);
    write_number(out, static_cast<int64_t>(a.dtype));
    write_number(out, static_cast<int64_t>(a.sizes.size()));
    for (const int64_t size : a.sizes) write_number(out, size);
    for (const int64_t stride : a.strides) write_number(out, stride);
    write_number(out, 0);
    write_number(out, static_cast<int64_t>(a.buffer->bytes()));
    out.write(a.buffer->data(), static_cast<std::streamsize>(a.buffer->bytes()));
  }
}

}  // namespace

int main(int count, char** arguments) try {
  if (count != 3) throw std::runtime_error("usage: run_cuda CASES RESULTS");
  std::ifstream in(arguments[1], std::ios::binary);
  std::ofstream out(arguments[2], std::ios::binary);
  if (!in || !out) throw std::runtime_error("cannot open the files");
  const int64_t cases = read_number(in);
  write_number(out, cases);
  for (int64_t i = 0; i < cases; ++i) write_case(out, run(read_case(in)));
  out.close();
  return out ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "run_cuda: %s\n", error.what());
  return 1;
}
