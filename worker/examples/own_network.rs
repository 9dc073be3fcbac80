//! Checks a generator and a discriminator of one's own, saved as TorchScript, as a job with
//! `model.kind = "script"` does, and says what would be trained.
//!
//!     cargo run --release -p ganglion-worker --example own_network -- tests/networks/G.pt tests/networks/D.pt 8
//!
//! The number is the length of the generator's noise (`model.latent_dim`). The networks are for the bundled
//! digits, 28 x 28 pixels. docs/networks.md says what a network has to be, and shows the job that trains it.

use std::error::Error;

use ganglion_proto::job::{Model, ModelKind, Precision};
use ganglion_worker::data::ImageShape;
use ganglion_worker::nn::{Models, Network};
use ganglion_worker::objective::gan::networks;
use ganglion_worker::state::StateLayout;

fn describe(name: &str, network: &dyn Network) {
    println!(
        "{name}{}",
        if network.sees_batch() { ", whose output for a sample depends on its batch" } else { "" }
    );
    for (role, tensors) in [("parameter", network.parameters()), ("buffer", network.buffers())] {
        for tensor in tensors {
            println!("  {role:<9} {:<40} {:?}", tensor.name, tensor.shape);
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [generator, discriminator, latent_dim] = &arguments[..] else {
        return Err("give the files of generator and discriminator, and the length of the noise".into());
    };
    let model = Model {
        generator: Some(generator.into()),
        discriminator: Some(discriminator.into()),
        ..Model::plain(ModelKind::Script, latent_dim.parse()?, 1)
    };
    // A network that cannot be trained to the same bits on any number of workers is refused here.
    let models = Models::new(&model, ImageShape { channels: 1, height: 28, width: 28 })?;
    describe("generator", &*models.generator);
    describe("discriminator", &*models.discriminator);
    let layout = StateLayout::new(&networks(&models), &[], Precision::Fp32);
    println!("a checkpoint has {} bytes", 4 * layout.len);
    Ok(())
}
