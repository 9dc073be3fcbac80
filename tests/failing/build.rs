//! Lets the workers find libtorch where torch-sys found it.

fn main() {
    if let Ok(libraries) = std::env::var("DEP_TCH_LIBTORCH_LIB") {
        for worker in ["failing-worker", "failing-regression", "failing-three"] {
            println!("cargo:rustc-link-arg-bin={worker}=-Wl,-rpath,{libraries}");
        }
    }
}
