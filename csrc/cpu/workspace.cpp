#include "workspace.h"

#include <new>

namespace kvq {

Workspace::~Workspace() { std::free(data_); }

void* Workspace::reserve(long bytes) {
  if (bytes > size_) {
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
    if (posix_memalign(&data_, 64, static_cast<size_t>(bytes)) != 0) throw std::bad_alloc();
    size_ = bytes;
  }
  return data_;
}

}  // namespace kvq
