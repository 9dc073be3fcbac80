//! Lets the benchmarks find libtorch where torch-sys found it.

fn main() {
    if let Ok(libraries) = std::env::var("DEP_TCH_LIBTORCH_LIB") {
        println!("cargo:rustc-link-arg-benches=-Wl,-rpath,{libraries}");
    }
}
