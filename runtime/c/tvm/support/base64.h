// Streams of bytes over a stream of base64, which TVM writes tensors in JSON by.
#ifndef TVM_SUPPORT_BASE64_H_
#define TVM_SUPPORT_BASE64_H_

#include <tvm/ffi/extra/base64.h>

#include <string>

#include "bytes_io.h"

namespace tvm::support {

class Base64OutStream : public BytesOutStream {
public:
    explicit Base64OutStream(Stream *into) : BytesOutStream(&bytes_), into_(into) {}

    void Finish() {
        ffi::String text = ffi::Base64Encode(TVMFFIByteArray{bytes_.data(), bytes_.size()});
        into_->Write(text.data(), text.size());
    }

private:
    std::string bytes_;
    Stream *into_;
};

class Base64InStream : public Stream {
public:
    using Stream::Read;
    using Stream::Write;

    explicit Base64InStream(Stream *from) : from_(from), bytes_(whole_) {}

    void InitPosition() {
        std::string text;
        for (char one; from_->Read(&one, 1);)
            text.push_back(one);
        whole_ = ffi::Base64Decode(TVMFFIByteArray{text.data(), text.size()});
        bytes_ = BytesInStream(whole_);
    }

    std::size_t Read(void *into, std::size_t size) override { return bytes_.Read(into, size); }
    std::size_t Write(const void *from, std::size_t size) override { return bytes_.Write(from, size); }

private:
    Stream *from_;
    ffi::Bytes whole_;
    BytesInStream bytes_;
};

} // namespace tvm::support

#endif
