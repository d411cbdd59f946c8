// dispatch.cpp: every path from the name of an operation to its code, on one screen.
#include "dispatch.h"

#include <dlfcn.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace lobs {

// A level's functions are in the namespace of its name (CMakeLists.txt); each level has all of
// them.
#define LOBS_DECLARE(Function, operation) Function operation;
#define LOBS_ENTER(Function, operation) row.operation = operation;
#define LOBS_ROW_OF(level)                                    \
    namespace level {                                         \
    LOBS_OPERATIONS(LOBS_DECLARE)                             \
    static Backend make_row(const char* detail, bool ready) { \
        Backend row{#level, detail, ready};                   \
        LOBS_OPERATIONS(LOBS_ENTER)                           \
        return row;                                           \
    }                                                         \
    }

#if defined(__x86_64__)
LOBS_ROW_OF(cpu_v4)
LOBS_ROW_OF(cpu_v3)
LOBS_ROW_OF(cpu_v1)
#else
LOBS_ROW_OF(cpu_base)
#endif

namespace {

std::string sibling(const char* file) {  // the path of a file next to this module
    Dl_info info;
    if (dladdr(reinterpret_cast<const void*>(&backend_rows), &info) == 0 ||
        info.dli_fname == nullptr)
        return file;
    const std::string module = info.dli_fname;
    const auto slash = module.rfind('/');
    return slash == std::string::npos ? std::string(file) : module.substr(0, slash + 1) + file;
}

// The row of the object in `file`. If there is none, *why says so.
Backend row_of(const char* file, std::string* why) {
    Backend row;
    void* object = dlopen(file, RTLD_NOW | RTLD_LOCAL);
    if (object == nullptr) {
        const char* reason = dlerror();
        *why = reason != nullptr ? reason : "no reason given";
        return row;
    }
    auto* entry = reinterpret_cast<BackendEntry*>(dlsym(object, "lobs_backend"));
    if (entry == nullptr || entry(kBackendVersion, &row) != 0) {
        *why = std::string(file) + " belongs to another version of lobs-native: reinstall";
        row = Backend{};
    }
    return row;
}

Backend cuda_row() {
    static std::string detail;
    std::string why;
    Backend row = row_of(sibling("_lobs_cuda.so").c_str(), &why);
    if (why.empty()) return row;
    detail = "the CUDA object is not installed or does not load: " + why;
    row.name = "cuda";
    row.detail = detail.c_str();
    return row;
}

#if defined(__x86_64__)
bool has_half_conversion() {  // F16C: part of x86-64-v3, but unknown to clang's builtin
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

std::vector<Backend> make_rows() {
    std::vector<Backend> rows;
    rows.push_back(cuda_row());
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2") && has_half_conversion();
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    rows.push_back(cpu_v4::make_row("x86-64-v4: AVX-512, FMA", v4));
    rows.push_back(cpu_v3::make_row("x86-64-v3: AVX2, FMA", v3));
    rows.push_back(cpu_v1::make_row("x86-64: SSE2", true));
#else
    rows.push_back(cpu_base::make_row("this platform's baseline", true));
#endif
    return rows;
}

std::vector<Backend>& rows() {
    static std::vector<Backend> table = make_rows();
    return table;
}

}  // namespace

const Backend* backend_rows(int* count) {
    *count = static_cast<int>(rows().size());
    return rows().data();
}

const char* backend_load(const char* file, const char** why) {
    static std::string reason;
    reason.clear();
    const Backend row = row_of(file, &reason);
    *why = reason.c_str();
    if (!reason.empty()) return nullptr;
    for (Backend& known : rows())
        if (std::strcmp(known.name, row.name) == 0) return known = row, known.name;
    rows().push_back(row);
    return row.name;
}

const Backend* backend_row(const char* name) {
    const char* forced = std::getenv("LOBS_CPU_LEVEL");
    const bool any = std::strcmp(name, "cpu") == 0;
    const std::string wanted =
        any && forced != nullptr && *forced != '\0' ? std::string("cpu_") + forced : name;
    for (const Backend& row : rows()) {
        if (wanted == row.name) return &row;
        if (any && wanted == "cpu" && row.ready && std::strncmp(row.name, "cpu", 3) == 0)
            return &row;
    }
    return nullptr;
}

bool backend_has(const Backend& row, const char* operation, bool* known) {
    *known = true;
#define LOBS_ASK(Function, column) \
    if (std::strcmp(operation, #column) == 0) return row.column != nullptr;
    LOBS_OPERATIONS(LOBS_ASK)
    *known = false;
    return false;
}

}  // namespace lobs
