// Streams over memory.
#ifndef TVM_SUPPORT_BYTES_IO_H_
#define TVM_SUPPORT_BYTES_IO_H_

#include <tvm/ffi/error.h>
#include <tvm/ffi/string.h>
#include <tvm/support/io.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <string_view>

namespace tvm::support {

class BytesInStream : public Stream {
public:
    using Stream::Read;
    using Stream::Write;

    explicit BytesInStream(const std::string &bytes) : rest_(bytes) {}
    explicit BytesInStream(const ffi::Bytes &bytes) : rest_(bytes.data(), bytes.size()) {}

    std::size_t Read(void *into, std::size_t size) override {
        std::size_t count = std::min(size, rest_.size());
        if (count)
            std::memcpy(into, rest_.data(), count);
        rest_.remove_prefix(count);
        return count;
    }

    std::size_t Write(const void *, std::size_t) override {
        TVM_FFI_THROW(InternalError) << "this stream is only read";
        return 0;
    }

private:
    std::string_view rest_;
};

class BytesOutStream : public Stream {
public:
    using Stream::Read;
    using Stream::Write;

    explicit BytesOutStream(std::string *bytes) : bytes_(bytes) {}

    std::size_t Write(const void *from, std::size_t size) override {
        bytes_->append(static_cast<const char *>(from), size);
        return size;
    }

    std::size_t Read(void *, std::size_t) override {
        TVM_FFI_THROW(InternalError) << "this stream is only written";
        return 0;
    }

private:
    std::string *bytes_;
};

} // namespace tvm::support

#endif
