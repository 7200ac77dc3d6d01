// What Python needs of ExecuTorch, as plain C: open a .pte, run one text, close.
//
// Nothing here prints or exits. A function that fails leaves its reason in egx_error() of the calling thread.
// Calls on one model must not overlap; sdk/egemma/runtimes/executorch.py holds the lock.

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/platform/platform.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <string>

using executorch::aten::ScalarType;
using executorch::extension::from_blob;
using executorch::extension::Module;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::PalImpl;
using executorch::runtime::Program;

// The wheel has the symbols of the thread pool, not its header.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  size_t get_thread_count() const;
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace {

thread_local std::string last_error;
thread_local bool inside_call = false;
// ExecuTorch gave up in the middle of something: its own state can no longer be relied on.
std::atomic<bool> broken{false};

struct Aborted : std::exception {};

// The first message of a failing call names the cause; what follows is each caller's complaint about it.
void keep_message(et_timestamp_t, et_pal_log_level_t level, const char*, const char*, size_t, const char* message, size_t length) {
  if ((level == kError || level == kFatal) && inside_call && last_error.size() < 500) {
    if (!last_error.empty()) last_error += "; ";
    last_error.append(message, length);
  }
}

// ExecuTorch ends the process when a check inside it fails. On the thread that called us an exception gets out instead.
[[noreturn]] void leave() {
  broken = true;
  if (inside_call) throw Aborted();
  std::abort();
}

const bool registered = executorch::runtime::register_pal(
    PalImpl::create(nullptr, leave, nullptr, nullptr, keep_message, nullptr, nullptr, __FILE__));

int fail(const std::string& what) {
  last_error = last_error.empty() ? what : what + " (" + last_error + ")";
  return -1;
}

int fail(const std::string& what, Error error) {
  return fail(what + ": " + executorch::runtime::to_string(error));
}

// Runs `body`, which returns 0 or the result of fail(); no exception crosses the C border.
template <typename Body>
int guarded(const Body& body) {
  last_error.clear();
  if (broken) return fail("ExecuTorch has failed in this process before and cannot be used again; start a new process");
  inside_call = true;
  int code;
  try {
    code = body();
  } catch (const Aborted&) {
    code = fail("ExecuTorch gave up");
  } catch (const std::exception& error) {
    code = fail(error.what());
  } catch (...) {
    code = fail("an unknown C++ exception");
  }
  inside_call = false;
  return code;
}

}  // namespace

struct egx_model {
  std::unique_ptr<Module> module;
  int32_t max_tokens;  // the longest input that memory was planned for
  int32_t dim;
};

#define EGX_API extern "C" __attribute__((visibility("default")))

// Why the last call on this thread failed; valid until the next call.
EGX_API const char* egx_error() { return last_error.c_str(); }

EGX_API const char* egx_version() { return EGX_EXECUTORCH_VERSION; }

// Gives the process's one thread pool that many threads; no model may be open. Returns 0, or -1.
EGX_API int egx_set_threads(uint32_t threads) {
  return guarded([&] {
    auto* pool = executorch::extension::threadpool::get_threadpool();
    if (pool == nullptr) return fail("no thread pool");
    if (pool->get_thread_count() == threads) return 0;
    if (!pool->_unsafe_reset_threadpool(threads)) return fail("the thread pool refused its new size");
    return pool->get_thread_count() == threads ? 0 : fail("the thread pool did not take its new size");
  });
}

// Maps the file and prepares forward(ids, mask: (1, T) int64) -> (1, D) float32. A model, or null.
EGX_API egx_model* egx_open(const char* path, int32_t* max_tokens, int32_t* dim) {
  auto model = std::make_unique<egx_model>();
  const int code = guarded([&] {
    model->module = std::make_unique<Module>(path, Module::LoadMode::Mmap);
    // InternalConsistency checks every offset of the program before it is followed. Delegate payloads are not part of it.
    Error error = model->module->load(Program::Verification::InternalConsistency);
    if (error != Error::Ok) return fail("not a program that ExecuTorch can read", error);

    const auto meta = model->module->method_meta("forward");
    if (!meta.ok()) return fail("no method named forward", meta.error());
    if (meta->num_inputs() != 2 || meta->num_outputs() != 1)
      return fail("forward takes " + std::to_string(meta->num_inputs()) + " inputs and gives " +
                  std::to_string(meta->num_outputs()) + " outputs, not 2 and 1");
    for (size_t i = 0; i < 2; ++i) {
      const auto input = meta->input_tensor_meta(i);
      if (!input.ok()) return fail("an input is not a tensor", input.error());
      if (input->scalar_type() != ScalarType::Long || input->sizes().size() != 2 || input->sizes()[0] != 1)
        return fail("an input is not a (1, T) int64 tensor");
      if (i == 1 && input->sizes()[1] != model->max_tokens) return fail("ids and mask differ in length");
      model->max_tokens = input->sizes()[1];
    }
    const auto output = meta->output_tensor_meta(0);
    if (!output.ok()) return fail("the output is not a tensor", output.error());
    if (output->scalar_type() != ScalarType::Float || output->sizes().size() != 2 || output->sizes()[0] != 1)
      return fail("the output is not a (1, D) float32 tensor");
    model->dim = output->sizes()[1];

    error = model->module->load_method("forward");
    return error == Error::Ok ? 0 : fail("forward could not be prepared", error);
  });
  if (code != 0) {
    // What gave up half-way is left alone: its destructors may wait for locks that nobody will release.
    if (broken) model.release();
    return nullptr;
  }
  *max_tokens = model->max_tokens;
  *dim = model->dim;
  return model.release();
}

// One text. ids and mask hold `tokens` values each, out has room for `dim` floats. Returns 0, or -1.
EGX_API int egx_run(egx_model* model, const int64_t* ids, const int64_t* mask, int32_t tokens, float* out, int32_t dim) {
  return guarded([&] {
    if (tokens < 1 || tokens > model->max_tokens)
      return fail(std::to_string(tokens) + " tokens; this program takes 1 to " + std::to_string(model->max_tokens));
    const auto id_tensor = from_blob(const_cast<int64_t*>(ids), {1, tokens}, ScalarType::Long);
    const auto mask_tensor = from_blob(const_cast<int64_t*>(mask), {1, tokens}, ScalarType::Long);
    const auto result = model->module->forward({EValue(id_tensor), EValue(mask_tensor)});
    if (!result.ok()) return fail("forward failed", result.error());
    if (result->size() != 1 || !result->at(0).isTensor()) return fail("forward did not return one tensor");
    const auto tensor = result->at(0).toTensor();
    if (tensor.scalar_type() != ScalarType::Float || tensor.numel() != dim || tensor.const_data_ptr<float>() == nullptr)
      return fail("forward returned " + std::to_string(tensor.numel()) + " values, not " + std::to_string(dim) + " floats");
    std::memcpy(out, tensor.const_data_ptr<float>(), sizeof(float) * static_cast<size_t>(dim));
    return 0;
  });
}

EGX_API void egx_close(egx_model* model) {
  if (broken) return;  // see egx_open
  guarded([&] {
    delete model;
    return 0;
  });
}
