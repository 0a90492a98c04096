// A stream of bytes, as TVM's runtime reads and writes its executables by; the wheel of apache-tvm lacks this header.
#ifndef TVM_SUPPORT_IO_H_
#define TVM_SUPPORT_IO_H_

#include <cstddef>

namespace tvm::support {

// How a type is written: `enabled`, `Write(Stream*, const T&)` and `Read(Stream*, T*)`, which says whether all was there.
template <typename T, typename Condition = void>
struct Serializer {
    static constexpr bool enabled = false;
};

class Stream {
public:
    virtual ~Stream() = default;

    // Return how many bytes there were.
    virtual std::size_t Read(void *into, std::size_t size) = 0;
    virtual std::size_t Write(const void *from, std::size_t size) = 0;

    template <typename T>
    bool Read(T *into) {
        static_assert(Serializer<T>::enabled, "nothing reads this type");
        return Serializer<T>::Read(this, into);
    }

    template <typename T>
    void Write(const T &value) {
        static_assert(Serializer<T>::enabled, "nothing writes this type");
        Serializer<T>::Write(this, value);
    }

    template <typename T>
    bool ReadArray(T *into, std::size_t count) {
        std::size_t done = 0;
        while (done < count && Read<T>(into + done))
            ++done;
        return done == count;
    }

    template <typename T>
    void WriteArray(const T *values, std::size_t count) {
        for (std::size_t n = 0; n < count; ++n)
            Write<T>(values[n]);
    }
};

} // namespace tvm::support

#endif
