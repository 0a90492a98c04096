// Checks the headers that TVM's runtime is compiled with beside its own (runtime/c/tvm): each line of main must hold.
#include <support/base64.h>
#include <support/utils.h>
#include <tvm/support/serializer.h>

#include <cstdio>

using namespace tvm;
using namespace tvm::support;

static int wrong;
#define HOLDS(condition) ((condition) ? (void)0 : (void)(++wrong, std::printf("line %d: %s\n", __LINE__, #condition)))

template <typename T>
static bool returns(const T &value) {
    std::string bytes;
    BytesOutStream out(&bytes);
    out.Write(value);
    for (size_t size = 0; size < bytes.size(); ++size) { // a file that is cut off is found out wherever it ends
        T made{};
        std::string start = bytes.substr(0, size);
        BytesInStream cut(start);
        if (cut.Read(&made))
            return false;
    }
    T made{};
    BytesInStream in(bytes);
    char more;
    return in.Read(&made) && made == value && in.Read(&more, 1) == 0;
}

static std::string through_base64(const std::string &bytes, std::string *text) {
    BytesOutStream plain(text);
    Base64OutStream out(&plain);
    out.Write(bytes.data(), bytes.size());
    out.Finish();
    BytesInStream from(*text);
    Base64InStream in(&from);
    in.InitPosition();
    std::string made(bytes.size(), '\0');
    char more;
    HOLDS(in.Read(made.data(), made.size()) == bytes.size());
    HOLDS(in.Read(&more, 1) == 0);
    return made;
}

int main() {
    HOLDS(returns<int32_t>(-7));
    HOLDS(returns<uint64_t>(1ULL << 63));
    HOLDS(returns<double>(0.1));
    HOLDS(returns<std::string>("engine"));
    HOLDS(returns<std::vector<int64_t>>({1, -2, 3}));
    HOLDS(returns<std::vector<std::string>>({"", "a", "bc"}));
    HOLDS(returns<ffi::String>("ß"));

    std::string bytes;
    BytesOutStream out(&bytes);
    out.Write(std::string("ab"));
    out.Write(DLDataType{kDLFloat, 32, 4});
    out.Write(DLDevice{kDLCPU, 3});
    const char wanted[] = "\2\0\0\0\0\0\0\0ab" "\2\x20\4\0" "\1\0\0\0\3\0\0\0";
    HOLDS(bytes == std::string(wanted, sizeof wanted - 1));
    BytesInStream in(bytes);
    std::string text;
    DLDataType type;
    DLDevice device;
    HOLDS(in.Read(&text) && in.Read(&type) && in.Read(&device));
    HOLDS(text == "ab" && type.code == kDLFloat && type.bits == 32 && type.lanes == 4);
    HOLDS(device.device_type == kDLCPU && device.device_id == 3);

    std::string endless("\xff\xff\xff\xff\xff\xff\xff\x7f" "abc", 11); // a length that no memory holds
    std::vector<int64_t> numbers;
    HOLDS(!BytesInStream(endless).Read(&text));
    HOLDS(!BytesInStream(endless).Read(&numbers));

    ffi::Array<ffi::String> names{"x", "y"}, read;
    std::string listed;
    BytesOutStream(&listed).Write(names);
    HOLDS(BytesInStream(listed).Read(&read) && read.size() == 2 && read[1] == "y");

    for (const char *one : {"", "f", "fo", "foo", "foob"}) {
        std::string encoded;
        HOLDS(through_base64(one, &encoded) == one);
        HOLDS(encoded.size() % 4 == 0);
    }
    std::string encoded;
    through_base64("foob", &encoded);
    HOLDS(encoded == "Zm9vYg==");

    bool refused = false;
    try {
        BytesInStream(bytes).Write("x", 1);
    } catch (const ffi::Error &error) {
        refused = error.kind() == "InternalError";
    }
    HOLDS(refused);
    HOLDS(IsNumber("42") && !IsNumber("") && !IsNumber("4a") && !IsNumber("-1"));
    return wrong != 0;
}
