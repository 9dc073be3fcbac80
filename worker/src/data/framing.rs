//! Framing: from an image of any size to a sample of the job's size, as numbers in [-1, 1].
//!
//! Invariants:
//! 1. The result is as if the image was first scaled so that its shorter side has `resize` pixels (the
//!    longer rounded to the nearest pixel) and the central square of `crop` pixels was then cut, one pixel
//!    more on the right and at the bottom where the rest is odd. Pixels outside the cut are not computed.
//! 2. Scaling is linear, over the area that a pixel covers (no aliasing), in fixed-point numbers whose
//!    weights come from additions, multiplications and divisions alone. So every processor and C library
//!    gives the same bits, which a filter with sines (Lanczos) does not promise.
//! 3. With `fit = "pad"` the longer side is scaled to `resize`, and the picture lies in the middle of a
//!    square of the background, one pixel more of it on the right and at the bottom where the rest is odd.

use fast_image_resize::images::{Image as Canvas, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use ganglion_proto::job::{Background, Data, Fit};
use image::{Pixel, Rgb};

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
    /// Scale so that the longer side has `side` pixels, and fill up to a square.
    Pad {
        /// Side of the square in pixels.
        side: u32,
        /// Red, green and blue of the rest.
        fill: [u8; 3],
    },
}

/// Position of a rectangle in an image, in pixels from its upper left corner.
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
        if data.fit == Fit::Pad {
            return Framing::pad(data);
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

    fn pad(data: &Data) -> Result<Framing, DataError> {
        let fill = match data.background {
            Some(Background::Colour(colour)) => colour,
            // A picture stores no colour beside itself.
            Some(Background::Stored) | None => [0; 3],
        };
        match (data.resize, data.crop) {
            (Some(side), crop) if crop.is_none_or(|crop| crop == side) => Ok(Framing::Pad { side, fill }),
            (Some(_), _) => Err(DataError::Input(
                "data.fit = \"pad\" cuts nothing; remove data.crop, or set data.fit = \"crop\"".to_owned(),
            )),
            (None, _) => Err(DataError::Input(
                "data.fit = \"pad\" needs the size of the square; set data.resize".to_owned(),
            )),
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
            Framing::Crop(side) | Framing::Resize { crop: side, .. } | Framing::Pad { side, .. } => {
                Ok((side as usize, side as usize))
            }
        }
    }

    /// Share of an image's area that is cut off, from 0 to 1.
    pub(super) fn lost(self, height: u32, width: u32) -> f64 {
        let shorter = f64::from(width.min(height));
        let kept = match self {
            Framing::Whole | Framing::Pad { .. } => return 0.0,
            Framing::Crop(crop) => f64::from(crop),
            Framing::Resize { side, crop } => shorter * f64::from(crop) / f64::from(side),
        };
        (1.0 - kept * kept / (f64::from(width) * f64::from(height))).max(0.0)
    }

    /// Whether an image is enlarged.
    pub(super) fn enlarges(self, height: u32, width: u32) -> bool {
        match self {
            Framing::Whole | Framing::Crop(_) => false,
            Framing::Resize { side, .. } => width.min(height) < side,
            Framing::Pad { side, .. } => width.max(height) < side,
        }
    }

    /// Encoding for the fingerprint: differs between framings that give different pixels.
    pub(super) fn to_bytes(self) -> Vec<u8> {
        let (side, crop, fill): (u32, u32, &[u8]) = match &self {
            Framing::Whole => (0, 0, &[]),
            Framing::Crop(crop) => (0, *crop, &[]),
            Framing::Resize { side, crop } => (*side, *crop, &[]),
            // A crop of no size is no other framing's.
            Framing::Pad { side, fill } => (*side, 0, fill),
        };
        let sizes = (u64::from(side) << 32) | u64::from(crop);
        // Sides are at most 8192, so both numbers fit.
        [&sizes.to_le_bytes(), fill].concat()
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
                let scaled = scale(image, &window(image, side, crop), crop, crop);
                let scaled =
                    Image { width: crop, height: crop, channels: image.channels, bytes: scaled.buffer() };
                write_planes(&scaled, 0, 0, crop as usize, out);
            }
            Framing::Pad { side, fill } => pad(image, side, fill, out),
        }
    }
}

/// Writes an image, scaled so that its longer side has `side` pixels, into the middle of a square of a
/// colour.
fn pad(image: &Image<'_>, side: u32, fill: [u8; 3], out: &mut [f32]) {
    let longer = image.width.max(image.height);
    let scaled = |length: u32| {
        // To the nearest pixel, in whole numbers; of a thin line one stays.
        let scaled = (u64::from(length) * u64::from(side) + u64::from(longer / 2)) / u64::from(longer);
        u32::try_from(scaled.max(1)).expect("at most the longer side")
    };
    let (width, height) = (scaled(image.width), scaled(image.height));
    let whole =
        Window { left: 0.0, top: 0.0, width: f64::from(image.width), height: f64::from(image.height) };
    let scaled = scale(image, &whole, width, height);
    let colour = match image.channels {
        1 => vec![Rgb(fill).to_luma()[0]],
        _ => fill.to_vec(),
    };
    let mut square = colour.repeat((side * side) as usize);
    let (row, at) =
        (width as usize * image.channels, |x: u32, y: u32| (y * side + x) as usize * image.channels);
    for (y, pixels) in (0..).zip(scaled.buffer().chunks_exact(row)) {
        let start = at((side - width) / 2, (side - height) / 2 + y);
        square[start..start + row].copy_from_slice(pixels);
    }
    let square = Image { width: side, height: side, channels: image.channels, bytes: &square };
    write_planes(&square, 0, 0, side as usize, out);
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

/// Scales a window of an image to a size in pixels.
fn scale(image: &Image<'_>, window: &Window, width: u32, height: u32) -> Canvas<'static> {
    let pixel = if image.channels == 1 { PixelType::U8 } else { PixelType::U8x3 };
    let source =
        ImageRef::new(image.width, image.height, image.bytes, pixel).expect("an image has all its bytes");
    let mut scaled = Canvas::new(width, height, pixel);
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

    /// Invariant 3.
    #[test]
    fn padding_keeps_all_of_a_picture() {
        let image = Image { width: 4, height: 2, channels: 3, bytes: &[7; 24] };
        let framing = Framing::Pad { side: 4, fill: [255, 0, 9] };
        let mut out = vec![0.0; 3 * 16];
        framing.render(&image, &mut out);
        let plane = |fill: u8| [[fill; 4], [7; 4], [7; 4], [fill; 4]].concat();
        let expected = [plane(255), plane(0), plane(9)].concat();
        assert_eq!(out, expected.iter().map(|byte| f32::from(*byte) / 127.5 - 1.0).collect::<Vec<f32>>());
        // A line of one pixel stays one, and an odd rest has one pixel more at the end.
        let line = Image { width: 1, height: 400, channels: 1, bytes: &[0; 400] };
        let mut out = vec![0.0; 16];
        Framing::Pad { side: 4, fill: [255; 3] }.render(&line, &mut out);
        assert_eq!(out, [1.0, -1.0, 1.0, 1.0].repeat(4));
        assert_eq!(framing.output_size(400, 28), Ok((4, 4)));
        assert_eq!(
            (framing.lost(400, 28), framing.enlarges(2, 3), framing.enlarges(4, 1)),
            (0.0, true, false)
        );
        assert_ne!(framing.to_bytes(), Framing::Pad { side: 4, fill: [255; 3] }.to_bytes());
    }

    #[test]
    fn the_lost_area_is_that_beside_the_cut() {
        let close =
            |found: f64, expected: f64| assert!((found - expected).abs() < 1e-12, "{found} {expected}");
        close(Framing::Whole.lost(28, 400), 0.0);
        close(Framing::Crop(14).lost(28, 28), 0.75);
        close(Framing::Resize { side: 64, crop: 64 }.lost(28, 400), 0.93);
        close(Framing::Resize { side: 64, crop: 32 }.lost(100, 100), 0.75);
        close(Framing::Resize { side: 64, crop: 64 }.lost(100, 100), 0.0);
        assert!(Framing::Resize { side: 64, crop: 32 }.enlarges(63, 90));
        assert!(!Framing::Resize { side: 64, crop: 32 }.enlarges(64, 90));
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
