//! Arrays of numbers: kinds of elements, names and shapes.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::names::display_as_in_the_file;

/// Kind of the elements of an array, by NumPy's and PyTorch's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ElementKind {
    /// One byte, 0 or 1.
    Bool,
    /// Unsigned, 8 bits.
    Uint8,
    /// Signed, 8 bits.
    Int8,
    /// Signed, 16 bits.
    Int16,
    /// Signed, 32 bits.
    Int32,
    /// Signed, 64 bits.
    Int64,
    /// IEEE 754, 16 bits.
    Float16,
    /// IEEE 754, 32 bits.
    Float32,
    /// IEEE 754, 64 bits.
    Float64,
}

display_as_in_the_file!(ElementKind);

impl ElementKind {
    /// Size of an element in bytes.
    pub fn size(self) -> usize {
        match self {
            ElementKind::Bool | ElementKind::Uint8 | ElementKind::Int8 => 1,
            ElementKind::Int16 | ElementKind::Float16 => 2,
            ElementKind::Int32 | ElementKind::Float32 => 4,
            ElementKind::Int64 | ElementKind::Float64 => 8,
        }
    }

    /// Whether an element can be infinite or no number.
    pub fn is_float(self) -> bool {
        matches!(self, ElementKind::Float16 | ElementKind::Float32 | ElementKind::Float64)
    }
}

/// One of the arrays of a sample.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ArraySpec {
    /// Name of the array.
    pub name: String,
    /// Kind of its elements.
    pub kind: ElementKind,
    /// Shape in one sample; empty for a single number.
    pub shape: Vec<u64>,
}

impl ArraySpec {
    /// Number of elements in one sample.
    pub fn numel(&self) -> usize {
        self.shape
            .iter()
            .map(|size| usize::try_from(*size).expect("shapes are checked where they are read"))
            .product()
    }

    /// Number of bytes in one sample.
    pub fn bytes(&self) -> usize {
        self.numel() * self.kind.size()
    }
}

impl fmt::Display for ArraySpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sizes: Vec<String> = self.shape.iter().map(u64::to_string).collect();
        match sizes.is_empty() {
            true => write!(f, "{} ({})", self.name, self.kind),
            false => write!(f, "{} ({} {})", self.name, sizes.join(" x "), self.kind),
        }
    }
}
