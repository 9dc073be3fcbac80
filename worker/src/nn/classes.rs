//! Conditional networks: wrappers that add classes to unconditional ones.
//!
//! The generator takes a learnt vector of its class beside the noise. The discriminator computes a vector
//! of an image, and its logit is the product with a learnt one of its class: the projection of Miyato and
//! Koyama (2018), "cGANs with projection discriminator", equation 3, without the unconditional term, as in
//! R3GAN's released code.

use std::sync::Arc;

use tch::Tensor;

use super::pieces::{Specs, embed, root, scaled};
use super::{Constant, Network, Pass, TensorSpec};

/// Name of the table of vectors, a parameter of both networks.
const TABLE: &str = "embedding.weight";

/// Role of the wrapped network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Generator,
    Discriminator,
}

/// Network with a learnt vector for each class.
#[derive(Clone, Debug)]
pub(super) struct OfClasses {
    network: Arc<dyn Network>,
    role: Role,
    classes: i64,
    length: i64,
}

impl OfClasses {
    /// Wraps a network of (n, 2 length) into a generator from noise (n, length).
    pub(super) fn generator(network: Arc<dyn Network>, classes: i64, length: i64) -> Arc<dyn Network> {
        Arc::new(OfClasses { network, role: Role::Generator, classes, length })
    }

    /// Wraps a network to (n, length) into a discriminator with logits (n, 1).
    pub(super) fn discriminator(network: Arc<dyn Network>, classes: i64, length: i64) -> Arc<dyn Network> {
        Arc::new(OfClasses { network, role: Role::Discriminator, classes, length })
    }
}

impl Network for OfClasses {
    /// The table is at the place of its use: first in a generator, last in a discriminator.
    fn parameters(&self) -> Vec<TensorSpec> {
        let mut table = Specs::default();
        let gain = match self.role {
            Role::Generator => 1.0,
            // The product sums over `length` features, so this keeps the logit's variance at 1.
            Role::Discriminator => 1.0 / root(self.length),
        };
        table.add_table(TABLE.to_string(), &[self.classes, self.length], scaled(gain, self.classes));
        match self.role {
            Role::Generator => [table.list, self.network.parameters()].concat(),
            Role::Discriminator => [self.network.parameters(), table.list].concat(),
        }
    }

    fn buffers(&self) -> Vec<TensorSpec> {
        self.network.buffers()
    }

    fn sees_batch(&self) -> bool {
        self.network.sees_batch()
    }

    fn forward(&self, input: &Tensor, pass: &mut Pass<'_>) -> Tensor {
        let all = pass.parameters;
        let few = "a table beside the network's parameters";
        let (table, own) = match self.role {
            Role::Generator => all.split_first().expect(few),
            Role::Discriminator => all.split_last().expect(few),
        };
        let row = embed(table, pass.classes);
        // The wrapped network knows no classes, and must not see the table among its parameters.
        let mut inner = Pass { parameters: own, classes: None, statistics: Vec::new(), ..*pass };
        let output = match self.role {
            Role::Generator => {
                // In the kind of the table, which is the kind of the pass.
                let input = Tensor::cat(&[input.to_kind(row.kind()), row], 1);
                self.network.forward(&input, &mut inner)
            }
            Role::Discriminator => {
                let seen = self.network.forward(input, &mut inner);
                (seen * row).sum_dim_intlist([1i64].as_slice(), true, None)
            }
        };
        // The wrapper has no buffers, so the updates are the network's in its own order.
        pass.statistics = inner.statistics;
        output
    }

    fn after(&self, buffers: &[Tensor], statistics: &[Tensor]) -> Vec<Tensor> {
        self.network.after(buffers, statistics)
    }

    fn constants(&self) -> &[Constant] {
        self.network.constants()
    }
}
