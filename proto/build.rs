//! Compiles the wire contract without protoc.

use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["session", "store", "admin"].map(|name| format!("ganglion/v1/{name}.proto"));
    println!("cargo:rerun-if-changed=ganglion");
    let descriptors = protox::compile(files, ["."])?;
    let file = std::path::Path::new(&std::env::var("OUT_DIR")?).join("ganglion.bin");
    std::fs::write(file, descriptors.encode_to_vec())?;
    tonic_prost_build::configure().btree_map(".").compile_fds(descriptors)?;
    Ok(())
}
