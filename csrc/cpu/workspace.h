// Scratch of one thread.
#pragma once

#include <stdlib.h>

namespace kvq {
namespace {

// Memory that only grows: a decode step must not pay page faults.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  ~Workspace() { __builtin_free(data_); }
  void* reserve(long bytes) {
    if (bytes > size_) {
      __builtin_free(data_);
      data_ = nullptr;
      size_ = 0;
      if (posix_memalign(&data_, 64, static_cast<size_t>(bytes)) != 0) __builtin_trap();
      size_ = bytes;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  long size_ = 0;
};

}  // namespace
}  // namespace kvq
