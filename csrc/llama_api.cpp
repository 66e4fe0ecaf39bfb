#include "llama_api_impl.h"

#include "common.h"

#include <atomic>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>

namespace dspark {

namespace {

// ---- log and backend ----

std::atomic<int> g_log_level{0};
thread_local std::string t_last_error; // what llama.cpp said on this thread since the last clear_error()
thread_local int t_n_guards = 0;       // AbortGuards alive on this thread

int level_of(ggml_log_level level) {
    switch (level) {
    case GGML_LOG_LEVEL_ERROR:
        return 1;
    case GGML_LOG_LEVEL_WARN:
        return 2;
    case GGML_LOG_LEVEL_INFO:
        return 3;
    default:
        return 4;
    }
}

void log_callback(ggml_log_level level, const char* text, void* /*user_data*/) {
    static thread_local int level_now = 4;
    if (level != GGML_LOG_LEVEL_CONT) {
        level_now = level_of(level);
    }
    if (level_now == 1 && t_last_error.size() < 4096) {
        t_last_error += text;
    }
    if (level_now <= g_log_level.load()) {
        std::fputs(text, stderr);
    }
}

// Called by ggml_abort, which ends the process when this returns.
void abort_callback(const char* message) {
    if (t_n_guards > 0) {
        const char* slash = std::strrchr(message, '/'); // the source file's directory tells nobody anything
        throw std::runtime_error(slash == nullptr ? message : slash + 1);
    }
    std::fprintf(stderr, "%s\n", message);
}

} // namespace

AbortGuard::AbortGuard() { ++t_n_guards; }
AbortGuard::~AbortGuard() { --t_n_guards; }

void clear_error() { t_last_error.clear(); }

std::string take_error(const std::string& otherwise) {
    std::string text = t_last_error.substr(0, t_last_error.find('\n'));
    t_last_error.clear();
    if (const size_t colon = text.find(": "); colon != std::string::npos && text.find(' ') > colon) {
        text = text.substr(colon + 2);
    }
    return text.empty() ? otherwise : text;
}

void ensure_backend() {
    static std::once_flag once;
    std::call_once(once, [] {
        llama_log_set(log_callback, nullptr);
        ggml_set_abort_callback(abort_callback);
        llama_backend_init();
    });
}

GgufFile::GgufFile(const std::string& file_path) : path(file_path) {
    std::error_code code;
    if (!std::filesystem::is_regular_file(path, code)) {
        throw ModelLoadError("cannot load " + path + ": no such file");
    }
    n_bytes = std::filesystem::file_size(path, code);
    clear_error();
    ggml_context* tensors = nullptr;
    gguf.reset(gguf_init_from_file(path.c_str(), {/*no_alloc*/ true, &tensors}));
    meta.reset(tensors);
    if (!gguf) {
        throw ModelLoadError("cannot load " + path + ": " + take_error("not a GGUF file"));
    }
}

int64_t GgufFile::key(const std::string& name, gguf_type type) const {
    const int64_t id = gguf_find_key(gguf.get(), name.c_str());
    return id >= 0 && gguf_get_kv_type(gguf.get(), id) == type ? id : -1;
}

std::string GgufFile::text(const std::string& name) const {
    const int64_t id = key(name, GGUF_TYPE_STRING);
    return id < 0 ? "" : gguf_get_val_str(gguf.get(), id);
}

int64_t GgufFile::integer(const std::string& name, int64_t otherwise) const {
    if (const int64_t id = key(name, GGUF_TYPE_UINT32); id >= 0) {
        return gguf_get_val_u32(gguf.get(), id);
    }
    if (const int64_t id = key(name, GGUF_TYPE_INT32); id >= 0) {
        return gguf_get_val_i32(gguf.get(), id);
    }
    return otherwise;
}

float GgufFile::real(const std::string& name, float otherwise) const {
    const int64_t id = key(name, GGUF_TYPE_FLOAT32);
    return id < 0 ? otherwise : gguf_get_val_f32(gguf.get(), id);
}

bool GgufFile::boolean(const std::string& name, bool otherwise) const {
    const int64_t id = key(name, GGUF_TYPE_BOOL);
    return id < 0 ? otherwise : gguf_get_val_bool(gguf.get(), id);
}

std::vector<int32_t> GgufFile::integers(const std::string& name) const {
    const int64_t id = key(name, GGUF_TYPE_ARRAY);
    if (id < 0) {
        return {};
    }
    const gguf_type type = gguf_get_arr_type(gguf.get(), id);
    if (type != GGUF_TYPE_INT32 && type != GGUF_TYPE_UINT32) {
        return {};
    }
    const auto* data = static_cast<const int32_t*>(gguf_get_arr_data(gguf.get(), id));
    return {data, data + gguf_get_arr_n(gguf.get(), id)};
}

const ggml_tensor* GgufFile::tensor(const std::string& name) const { return ggml_get_tensor(meta.get(), name.c_str()); }

TensorBytes GgufFile::read(const std::string& name) const {
    const ggml_tensor* found = tensor(name);
    TensorBytes bytes;
    bytes.name = name;
    bytes.type = ggml_type_name(found->type);
    bytes.shape.assign(found->ne, found->ne + ggml_n_dims(found));
    bytes.row_bytes = ggml_row_size(found->type, found->ne[0]);
    const size_t n = ggml_nbytes(found);
    const size_t begin = gguf_get_data_offset(gguf.get()) +
                         gguf_get_tensor_offset(gguf.get(), gguf_find_tensor(gguf.get(), name.c_str()));
    if (begin + n < begin || begin + n > n_bytes) {
        throw ModelLoadError("cannot load " + path + ": tensor " + name + " reaches past the end of the file");
    }
    bytes.data.resize(n);
    std::ifstream file(path, std::ios::binary);
    file.seekg(static_cast<std::streamoff>(begin));
    if (!file.read(reinterpret_cast<char*>(bytes.data.data()), static_cast<std::streamsize>(n))) {
        throw ModelLoadError("cannot load " + path + ": cannot read tensor " + name);
    }
    return bytes;
}

void GgufFile::check_integer(const std::string& name, int64_t least, int64_t most, bool is_optional) const {
    const int64_t id = gguf_find_key(gguf.get(), name.c_str());
    const int64_t value = integer(name, -1);
    if ((id < 0 && is_optional) || (value >= least && value <= most)) {
        return;
    }
    std::string got = std::to_string(value);
    if (id < 0) {
        got = "nothing";
    } else if (value == -1) {
        got = std::string("a value of type ") + gguf_type_name(gguf_get_kv_type(gguf.get(), id));
    }
    throw ModelLoadError("cannot load " + path + ": " + name + " must be an integer in " + std::to_string(least) +
                         " .. " + std::to_string(most) + ", got " + got);
}

// Norms enter element-wise products, which know floats only and abort on anything else.
void GgufFile::check_norm_type(int64_t tensor_index) const {
    const std::string name = gguf_get_tensor_name(gguf.get(), tensor_index);
    const ggml_type type = gguf_get_tensor_type(gguf.get(), tensor_index);
    if (name.ends_with("norm.weight") && type != GGML_TYPE_F32 && type != GGML_TYPE_F16 && type != GGML_TYPE_BF16) {
        throw ModelLoadError("cannot load " + path + ": tensor " + name + " must be of a float type, got " +
                             ggml_type_name(type));
    }
}

void GgufFile::check() const {
    auto fail = [this](const std::string& cause) { throw ModelLoadError("cannot load " + path + ": " + cause); };
    const std::string architecture = text("general.architecture");
    if (architecture.empty()) {
        fail("general.architecture is missing");
    }
    if (llm_arch_from_string(architecture) == LLM_ARCH_UNKNOWN) {
        fail("unknown architecture '" + architecture + "'");
    }
    check_integer(architecture + ".block_count", 1, LLAMA_MAX_LAYERS);
    check_integer(architecture + ".embedding_length", 1, 1 << 20);
    for (const char* name : {".attention.head_count", ".attention.head_count_kv"}) {
        if (key(architecture + name, GGUF_TYPE_ARRAY) < 0) { // arrays (one per layer) are llama.cpp's to check
            check_integer(architecture + name, std::string(name) == ".attention.head_count" ? 1 : 0, 1 << 16, true);
        }
    }
    // A norm with a negative epsilon aborts in the first decode, on a thread that cannot report it.
    for (const char* name : {".attention.layer_norm_rms_epsilon", ".attention.layer_norm_epsilon"}) {
        const float epsilon = real(architecture + name, 0.0F);
        if (!(epsilon >= 0.0F && epsilon <= 1.0F)) {
            fail(std::string(name + 1) + " must be in 0 .. 1, got " + std::to_string(epsilon));
        }
    }
    const int64_t head_size = integer(architecture + ".attention.key_length", 1 << 16);
    check_integer(architecture + ".rope.dimension_count", 0, head_size, true); // more aborts in the first decode
    if (gguf_get_n_tensors(gguf.get()) == 0) {
        fail("the file holds no tensors");
    }
    for (int64_t i = 0; i < gguf_get_n_tensors(gguf.get()); ++i) {
        check_norm_type(i);
        const size_t end = gguf_get_data_offset(gguf.get()) + gguf_get_tensor_offset(gguf.get(), i) +
                           gguf_get_tensor_size(gguf.get(), i);
        if (end > n_bytes) {
            fail(std::string("the file is truncated: tensor ") + gguf_get_tensor_name(gguf.get(), i) +
                 " ends at byte " + std::to_string(end) + " of " + std::to_string(n_bytes));
        }
    }
}

ggml_type parse_type(const std::string& name) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const auto type = static_cast<ggml_type>(i);
        if (ggml_type_name(type) != nullptr && name == ggml_type_name(type)) {
            return type;
        }
    }
    throw std::invalid_argument("type must be a type of ggml, got " + name);
}

// ---- build ----

void set_log_level(int level) {
    if (level < 0 || level > 4) {
        throw std::invalid_argument("log level must be in 0 .. 4, got " + std::to_string(level));
    }
    g_log_level = level;
}

int32_t n_math_threads() {
    const auto n_allowed = static_cast<int32_t>(std::thread::hardware_concurrency()); // respects the affinity mask
    return std::max(1, std::min(n_allowed, common_cpu_get_num_math()));
}

BuildInfo build_info() {
    ensure_backend();
    BuildInfo info;
    info.version = DSPARK_VERSION;
    info.llama_cpp_commit = DSPARK_LLAMA_CPP_COMMIT;
    info.system_info = llama_print_system_info();
    for (size_t i = 0; i < ggml_backend_reg_count(); ++i) {
        info.backends.emplace_back(ggml_backend_reg_name(ggml_backend_reg_get(i)));
    }
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t device = ggml_backend_dev_get(i);
        DeviceInfo entry{ggml_backend_dev_name(device), ggml_backend_dev_description(device), "accel", 0, 0};
        switch (ggml_backend_dev_type(device)) {
        case GGML_BACKEND_DEVICE_TYPE_CPU:
            entry.kind = "cpu";
            break;
        case GGML_BACKEND_DEVICE_TYPE_GPU:
            entry.kind = "gpu";
            break;
        case GGML_BACKEND_DEVICE_TYPE_IGPU:
            entry.kind = "igpu";
            break;
        default:
            break;
        }
        ggml_backend_dev_memory(device, &entry.memory_free_bytes, &entry.memory_total_bytes);
        info.devices.push_back(entry);
    }
    return info;
}

namespace {

llama_ftype parse_ftype(const std::string& name) {
    static const std::map<std::string, llama_ftype> types = {
        {"f32", LLAMA_FTYPE_ALL_F32},          {"f16", LLAMA_FTYPE_MOSTLY_F16},
        {"bf16", LLAMA_FTYPE_MOSTLY_BF16},     {"q8_0", LLAMA_FTYPE_MOSTLY_Q8_0},
        {"q4_0", LLAMA_FTYPE_MOSTLY_Q4_0},     {"q4_1", LLAMA_FTYPE_MOSTLY_Q4_1},
        {"q5_0", LLAMA_FTYPE_MOSTLY_Q5_0},     {"q5_1", LLAMA_FTYPE_MOSTLY_Q5_1},
        {"q2_k", LLAMA_FTYPE_MOSTLY_Q2_K},     {"q3_k_s", LLAMA_FTYPE_MOSTLY_Q3_K_S},
        {"q3_k_m", LLAMA_FTYPE_MOSTLY_Q3_K_M}, {"q3_k_l", LLAMA_FTYPE_MOSTLY_Q3_K_L},
        {"q4_k_s", LLAMA_FTYPE_MOSTLY_Q4_K_S}, {"q4_k_m", LLAMA_FTYPE_MOSTLY_Q4_K_M},
        {"q5_k_s", LLAMA_FTYPE_MOSTLY_Q5_K_S}, {"q5_k_m", LLAMA_FTYPE_MOSTLY_Q5_K_M},
        {"q6_k", LLAMA_FTYPE_MOSTLY_Q6_K},     {"iq4_nl", LLAMA_FTYPE_MOSTLY_IQ4_NL},
        {"iq4_xs", LLAMA_FTYPE_MOSTLY_IQ4_XS},
    };
    const auto found = types.find(name);
    if (found == types.end()) {
        throw std::invalid_argument("type_name must be a known quantization, got " + name);
    }
    return found->second;
}

std::string regex_of(const std::string& name) {
    std::string pattern = "^";
    for (const char c : name) {
        pattern += c == '.' ? std::string("\\.") : std::string(1, c);
    }
    return pattern + "$";
}

} // namespace

void quantize_model(const std::string& source, const std::string& destination, const std::string& type_name,
                    const std::vector<std::string>& keep, int32_t n_threads) {
    ensure_backend();
    const llama_ftype ftype = parse_ftype(type_name);
    const GgufFile file(source);
    file.check();
    std::error_code code;
    if (std::filesystem::equivalent(source, destination, code)) {
        throw std::invalid_argument("destination must be another file than source, got " + destination);
    }
    std::vector<std::string> patterns;
    std::vector<ggml_type> types;
    for (const std::string& name : keep) {
        if (const ggml_tensor* tensor = file.tensor(name)) {
            patterns.push_back(regex_of(name));
            types.push_back(tensor->type);
        }
    }
    std::vector<llama_model_tensor_override> overrides;
    for (size_t i = 0; i < patterns.size(); ++i) {
        overrides.push_back({patterns[i].c_str(), types[i]});
    }
    overrides.push_back({nullptr, GGML_TYPE_COUNT});

    llama_model_quantize_params params = llama_model_quantize_default_params();
    params.ftype = ftype;
    params.nthread = n_threads;
    params.allow_requantize = true;
    params.tt_overrides = overrides.data();
    clear_error();
    if (llama_model_quantize(source.c_str(), destination.c_str(), &params) != 0) {
        throw ModelLoadError("cannot quantize " + source + ": " + take_error("llama.cpp gave no reason"));
    }
}

} // namespace dspark
