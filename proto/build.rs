//! Compiles the wire contract without protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["session", "job", "store", "admin"].map(|name| format!("ganglion/v1/{name}.proto"));
    println!("cargo:rerun-if-changed=ganglion");
    tonic_prost_build::configure().btree_map(".").compile_fds(protox::compile(files, ["."])?)?;
    Ok(())
}
