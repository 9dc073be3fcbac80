//! Framing: from an image of any size to a sample of the job's size, as numbers in [-1, 1].
//!
//! Invariants:
//! 1. The result is as if the image was first scaled so that its shorter side has `resize` pixels (the
//!    longer rounded to the nearest pixel) and the central square of `crop` pixels was then cut, one pixel
//!    more on the right and at the bottom where the rest is odd. Pixels outside the cut are not computed.
//! 2. Scaling is linear, over the area that a pixel covers (no aliasing), in fixed-point numbers whose
//!    weights come from additions, multiplications and divisions alone. So every processor and C library
//!    gives the same bits, which a filter with sines (Lanczos) does not promise.

use fast_image_resize::images::{Image as Canvas, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use ganglion_proto::job::Data;

use super::{DataError, MAX_SIDE};

/// Unframed image.
pub(super) struct Image<'a> {
    /// Width in pixels, not 0.
    pub(super) width: u32,
    /// Height in pixels, not 0.
    pub(super) height: u32,
    /// Number of channels, 1 or 3.
    pub(super) channels: usize,
    /// Pixels: height x width x channels.
    pub(super) bytes: &'a [u8],
}

/// Scaling and crop of a job.
#[derive(Clone, Copy, Debug)]
pub(super) enum Framing {
    /// No change.
    Whole,
    /// The central square with this side in pixels.
    Crop(u32),
    /// Scale so that the shorter side has `side` pixels, then cut the central square of `crop`, at most
    /// `side`.
    Resize { side: u32, crop: u32 },
}

/// Position of a square in an image, in pixels from its upper left corner.
struct Window {
    left: f64,
    top: f64,
    width: f64,
    height: f64,
}

impl Framing {
    /// Reads and checks `resize` and `crop`.
    pub(super) fn new(data: &Data) -> Result<Framing, DataError> {
        for (key, side) in [("resize", data.resize), ("crop", data.crop)] {
            if let Some(side) = side.filter(|side| !(1..=MAX_SIDE).contains(side)) {
                return Err(DataError::Input(format!(
                    "data.{key} = {side} is not a size in pixels; set it from 1 to {MAX_SIDE}"
                )));
            }
        }
        match (data.resize, data.crop) {
            // All samples then need one size, which is checked when the data are opened.
            (None, None) => Ok(Framing::Whole),
            (None, Some(crop)) => Ok(Framing::Crop(crop)),
            (Some(side), crop) => {
                // Samples are square unless they keep their own size.
                let crop = crop.unwrap_or(side);
                if crop > side {
                    return Err(DataError::Input(format!(
                        "data.crop = {crop} does not fit into images that data.resize = {side} \
                         scales to {side} pixels; set data.crop to at most {side}"
                    )));
                }
                Ok(Framing::Resize { side, crop })
            }
        }
    }

    /// Returns height and width of an image after framing, or the reason why it does not fit.
    pub(super) fn output_size(self, height: u32, width: u32) -> Result<(usize, usize), String> {
        let found = format!("found images of {width} x {height} pixels (width x height)");
        match self {
            _ if height == 0 || width == 0 => Err(format!("{found}, which have no pixels; remove them")),
            Framing::Whole if height.max(width) > MAX_SIDE => Err(format!(
                "{found}, expected at most {MAX_SIDE} a side; set data.resize to the size to \
                 train on"
            )),
            Framing::Crop(crop) if height.min(width) < crop => Err(format!(
                "{found}, too small for data.crop = {crop}; set data.crop to at most {} or set \
                 data.resize too",
                height.min(width)
            )),
            Framing::Whole => Ok((height as usize, width as usize)),
            Framing::Crop(crop) | Framing::Resize { crop, .. } => Ok((crop as usize, crop as usize)),
        }
    }

    /// Encoding for the fingerprint: differs between framings that give different pixels.
    pub(super) fn to_bytes(self) -> [u8; 8] {
        let (side, crop) = match self {
            Framing::Whole => (0, 0),
            Framing::Crop(crop) => (0, crop),
            Framing::Resize { side, crop } => (side, crop),
        };
        // Sides are at most 8192, so both numbers fit.
        ((u64::from(side) << 32) | u64::from(crop)).to_le_bytes()
    }

    /// Writes the framed image to `out`, channels x height x width, in [-1, 1].
    ///
    /// `out` must have the size that [`output_size`](Self::output_size) gave for the image.
    pub(super) fn render(self, image: &Image<'_>, out: &mut [f32]) {
        match self {
            Framing::Whole => write_planes(image, 0, 0, image.width as usize, out),
            Framing::Crop(crop) => {
                let left = (image.width - crop) as usize / 2;
                // Rounded down: one pixel more is cut on the right and at the bottom (invariant 1).
                let top = (image.height - crop) as usize / 2;
                write_planes(image, left, top, crop as usize, out);
            }
            Framing::Resize { side, crop } => {
                let scaled = scale(image, &window(image, side, crop), crop);
                let scaled =
                    Image { width: crop, height: crop, channels: image.channels, bytes: scaled.buffer() };
                write_planes(&scaled, 0, 0, crop as usize, out);
            }
        }
    }
}

/// Returns the part of `image` that becomes the central square of `crop` pixels once the shorter side is
/// scaled to `side`.
fn window(image: &Image<'_>, side: u32, crop: u32) -> Window {
    let shorter = image.width.min(image.height);
    let span = |length: u32| {
        // To the nearest pixel, in whole numbers: the same on all machines.
        let scaled = (u64::from(length) * u64::from(side) + u64::from(shorter / 2)) / u64::from(shorter);
        // Exact: the scaled length is below 2^32 x 2^13.
        let ratio = f64::from(length) / scaled as f64;
        let start = ((scaled - u64::from(crop)) / 2) as f64 * ratio;
        // Rounding may put the end a hair beyond the image, which the scaler would refuse.
        (start, (f64::from(crop) * ratio).min(f64::from(length) - start))
    };
    let ((left, width), (top, height)) = (span(image.width), span(image.height));
    Window { left, top, width, height }
}

/// Scales a window of an image to a square of `side` pixels.
fn scale(image: &Image<'_>, window: &Window, side: u32) -> Canvas<'static> {
    let pixel = if image.channels == 1 { PixelType::U8 } else { PixelType::U8x3 };
    let source =
        ImageRef::new(image.width, image.height, image.bytes, pixel).expect("an image has all its bytes");
    let mut scaled = Canvas::new(side, side, pixel);
    // In the library this is the triangle over the area of a pixel when it scales down (invariant 2).
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Bilinear)).crop(
        window.left,
        window.top,
        window.width,
        window.height,
    );
    Resizer::new()
        .resize(&source, &mut scaled, &options)
        .expect("the window lies inside the image and both have the same kind of pixels");
    scaled
}

/// Writes a window of an image, `width` wide and as high as `out` has room for, one plane for each channel.
fn write_planes(image: &Image<'_>, left: usize, top: usize, width: usize, out: &mut [f32]) {
    let channels = image.channels;
    let plane = out.len() / channels;
    let rows = image.bytes.chunks_exact(image.width as usize * channels);
    for (y, row) in rows.skip(top).take(plane / width).enumerate() {
        let pixels = row.chunks_exact(channels).skip(left).take(width);
        for (x, pixel) in pixels.enumerate() {
            for (channel, &value) in pixel.iter().enumerate() {
                // 0 becomes -1 and 255 becomes 1, both exactly.
                out[channel * plane + y * width + x] = f32::from(value) / 127.5 - 1.0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(width: u32, height: u32, channels: usize) -> Vec<u8> {
        let mut bytes = vec![0; width as usize * height as usize * channels];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        bytes
    }

    /// Invariant 1, against the two operations done one after the other.
    #[test]
    fn resize_with_crop_is_a_resize_then_a_crop() {
        for (width, height, side, crop) in
            [(37, 23, 16, 11), (23, 38, 9, 9), (5, 4, 32, 31), (64, 64, 64, 20)]
        {
            for channels in [1, 3] {
                let bytes = noise(width, height, channels);
                let image = Image { width, height, channels, bytes: &bytes };
                let crop_numel = crop as usize * crop as usize * channels;

                let shorter = width.min(height);
                let (full_width, full_height) =
                    ((width * side + shorter / 2) / shorter, (height * side + shorter / 2) / shorter);
                let pixel = if channels == 1 { PixelType::U8 } else { PixelType::U8x3 };
                let source = ImageRef::new(width, height, &bytes, pixel).unwrap();
                let mut full = Canvas::new(full_width, full_height, pixel);
                let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Bilinear));
                Resizer::new().resize(&source, &mut full, &options).unwrap();
                let full = Image { width: full_width, height: full_height, channels, bytes: full.buffer() };
                let mut expected = vec![0.0; crop_numel];
                Framing::Crop(crop).render(&full, &mut expected);

                let mut found = vec![0.0; crop_numel];
                Framing::Resize { side, crop }.render(&image, &mut found);
                assert_eq!(found, expected, "{width} x {height} to {side}, cut to {crop}");
            }
        }
    }

    /// Invariant 2: these bits hold on every machine, with and without vector instructions.
    #[test]
    fn scaled_bits_never_change() {
        let bytes = noise(37, 23, 3);
        let mut out = vec![0.0; 3 * 11 * 11];
        let image = Image { width: 37, height: 23, channels: 3, bytes: &bytes };
        Framing::Resize { side: 16, crop: 11 }.render(&image, &mut out);
        let raw: Vec<u8> = out.iter().flat_map(|value| value.to_le_bytes()).collect();
        assert_eq!(
            blake3::hash(&raw).to_hex().as_str(),
            "766b048a35b18a296bb9ea5581f0beab907119f6d4e0a2076beee642b52867d1"
        );
    }

    #[test]
    fn the_cut_is_central_and_planar() {
        let bytes: Vec<u8> = (0..4 * 3 * 3).collect();
        let image = Image { width: 4, height: 3, channels: 3, bytes: &bytes };
        let mut out = vec![0.0; 3];
        Framing::Crop(1).render(&image, &mut out);
        // Row 1, column 1: pixel 5, whose channels are bytes 15 to 17.
        assert_eq!(out, [15.0, 16.0, 17.0].map(|byte: f32| byte / 127.5 - 1.0));
    }
}
