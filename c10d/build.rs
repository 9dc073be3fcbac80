//! Compiles the C++ shim against libtorch's headers and tells the linker where libtorch is.

use std::path::PathBuf;
use std::{env, fs};

fn main() {
    // torch-sys looks for libtorch and hands its folder of libraries on.
    let lib = env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys exports the folder of libtorch");
    let lib = PathBuf::from(lib);
    let torch = lib.parent().expect("libtorch's libraries lie in a folder of libtorch").to_owned();
    let cuda = env::var_os("CARGO_FEATURE_CUDA").is_some();

    let mut sources = vec![
        "error",
        "handle",
        "group",
        "gloo",
        "store",
        "aten",
        "processor",
        "product",
        "convolution",
        "transformer",
        "script",
        "package",
        "graph_product",
    ];
    if cuda {
        sources.extend(["nccl", "cuda"]);
    }
    let mut build = cxx_build::bridges(["src/ffi.rs", "src/aten_ffi.rs"]);
    build
        .file(as_one_unit(&sources))
        .include(".")
        .include("shim/gloo_names")
        .include(torch.join("include"))
        .include(torch.join("include/torch/csrc/api/include"))
        .define("USE_C10D_GLOO", None)
        .std("c++17")
        // libtorch's headers are not warning-free.
        .warnings(false);
    if cuda {
        // The wheels of CUDA and NCCL lie beside libtorch's own, under `nvidia`.
        let site = torch.parent().expect("libtorch lies in a folder of packages");
        build
            .define("USE_C10D_NCCL", None)
            .include(site.join("nvidia/cu13/include"))
            .include(site.join("nvidia/nccl/include"));
    }
    build.compile("c10d_shim");
    if env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|arch| arch == "x86_64") {
        compile_kernels("8", &["-mavx2", "-mfma"]);
        compile_kernels("16", &["-mavx512f", "-mavx2", "-mfma"]);
    }

    println!("cargo:rustc-link-search=native={}", lib.display());
    let libraries: &[&str] = &["torch_cpu", "c10"];
    let cuda_libraries: &[&str] = if cuda { &["torch_cuda", "c10_cuda"] } else { &[] };
    for library in cuda_libraries.iter().chain(libraries) {
        println!("cargo:rustc-link-lib={library}");
    }
    // For this package's own tests; a binary of another package says so itself.
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
    println!("cargo:rerun-if-changed=shim");
    println!("cargo:rerun-if-changed=src/ffi.rs");
    println!("cargo:rerun-if-changed=src/aten_ffi.rs");
}

/// Compiles the kernels for vectors of so many floats.
fn compile_kernels(lanes: &str, instructions: &[&str]) {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").define("LANES", lanes);
    build.files(["shim/small_product_kernel.cc", "shim/transformer_kernel.cc"]);
    // In every profile: without optimisation they take a hundred times as long. A product and an addition
    // become one instruction where the source says so, and nowhere else.
    build.opt_level(3).flag("-ffp-contract=off");
    // The compiler's own intrinsics begin with a variable that has no value.
    build.flag_if_supported("-Wno-uninitialized").flag_if_supported("-Wno-maybe-uninitialized");
    instructions.iter().for_each(|flag| {
        build.flag(flag);
    });
    build.compile(&format!("kernels_{lanes}"));
}

/// A source that includes the others: the compiler needs far longer to read libtorch's headers than the shim.
fn as_one_unit(sources: &[&str]) -> PathBuf {
    let unit =
        PathBuf::from(env::var_os("OUT_DIR").expect("cargo gives build scripts a folder")).join("shim.cc");
    let includes = sources.iter().map(|name| format!("#include \"shim/{name}.cc\"\n"));
    fs::write(&unit, includes.collect::<String>()).expect("cargo's folder can be written to");
    unit
}
