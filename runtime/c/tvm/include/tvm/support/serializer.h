// How values lie in a stream: numbers little-endian, sequences after their length in 64 bits. Of the types that TVM
// serializes, those that engines for CPUs hold.
#ifndef TVM_SUPPORT_SERIALIZER_H_
#define TVM_SUPPORT_SERIALIZER_H_

#include <dlpack/dlpack.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/endian.h>
#include <tvm/ffi/string.h>
#include <tvm/support/io.h>

#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

namespace tvm::support {

static_assert(TVM_FFI_IO_NO_ENDIAN_SWAP, "every machine that engines are built for is little-endian");

template <typename T>
struct Serializer<T, std::enable_if_t<std::is_arithmetic_v<T> || std::is_enum_v<T>>> {
    static constexpr bool enabled = true;
    static void Write(Stream *stream, const T &value) { stream->Write(static_cast<const void *>(&value), sizeof value); }
    static bool Read(Stream *stream, T *value) { return stream->Read(static_cast<void *>(value), sizeof *value) == sizeof *value; }
};

// A length is what the file says: the elements are read one by one, so that a wrong one ends with the file.
template <typename Sequence>
struct SequenceSerializer {
    using Element = typename Sequence::value_type;
    static constexpr bool enabled = Serializer<Element>::enabled;

    static void Write(Stream *stream, const Sequence &values) {
        stream->Write<std::uint64_t>(values.size());
        stream->WriteArray(values.data(), values.size());
    }

    static bool Read(Stream *stream, Sequence *values) {
        std::uint64_t size = 0;
        values->clear();
        if (!stream->Read(&size))
            return false;
        for (Element one; size; --size) {
            if (!stream->Read(&one))
                return false;
            values->push_back(one);
        }
        return true;
    }
};

template <>
struct Serializer<std::string> : SequenceSerializer<std::string> {};

template <typename T>
struct Serializer<std::vector<T>> : SequenceSerializer<std::vector<T>> {};

// What TVM holds as an object lies there as the standard library's type does.
template <>
struct Serializer<ffi::String> {
    static constexpr bool enabled = true;
    static void Write(Stream *stream, const ffi::String &text) { stream->Write(std::string(text)); }

    static bool Read(Stream *stream, ffi::String *text) {
        std::string plain;
        bool whole = stream->Read(&plain);
        *text = plain;
        return whole;
    }
};

template <typename T>
struct Serializer<ffi::Array<T>> {
    static constexpr bool enabled = Serializer<T>::enabled;

    static void Write(Stream *stream, const ffi::Array<T> &values) {
        stream->Write(std::vector<T>(values.begin(), values.end()));
    }

    static bool Read(Stream *stream, ffi::Array<T> *values) {
        std::vector<T> plain;
        bool whole = stream->Read(&plain);
        *values = ffi::Array<T>(plain.begin(), plain.end());
        return whole;
    }
};

template <>
struct Serializer<DLDataType> {
    static constexpr bool enabled = true;

    static void Write(Stream *stream, const DLDataType &type) {
        stream->Write(type.code);
        stream->Write(type.bits);
        stream->Write(type.lanes);
    }

    static bool Read(Stream *stream, DLDataType *type) {
        return stream->Read(&type->code) && stream->Read(&type->bits) && stream->Read(&type->lanes);
    }
};

template <>
struct Serializer<DLDevice> {
    static constexpr bool enabled = true;

    static void Write(Stream *stream, const DLDevice &device) {
        stream->Write(static_cast<std::int32_t>(device.device_type));
        stream->Write(device.device_id);
    }

    static bool Read(Stream *stream, DLDevice *device) {
        std::int32_t type = 0;
        bool whole = stream->Read(&type) && stream->Read(&device->device_id);
        device->device_type = static_cast<DLDeviceType>(type);
        return whole;
    }
};

} // namespace tvm::support

#endif
