//! Conversion between tensors of floats and bytes, in this machine's byte order.

use tch::{Device, Kind, Tensor};

/// Copies a tensor of floats into bytes.
pub fn to_bytes(tensor: &Tensor) -> Vec<u8> {
    let bytes_of = tensor.to_device(Device::Cpu).contiguous().view_dtype(Kind::Uint8);
    let mut bytes = vec![0; bytes_of.numel()];
    bytes_of.copy_data(&mut bytes, bytes_of.numel());
    bytes
}

/// Returns the flat tensor of floats with these bytes.
pub fn from_bytes(bytes: &[u8]) -> Tensor {
    Tensor::from_slice(bytes).view_dtype(Kind::Float)
}
