//! Decoding of pictures: size, orientation and pixels from the bytes of a file.
//!
//! 1. The content decides the format: the extension of a file's name is often wrong.
//! 2. Memory is bounded by the file, not by the size in pixels that it claims.
//! 3. A picture is turned and mirrored as its EXIF data says, unless the job ignores that.
//! 4. A picture without transparent parts has the same pixels whatever the background.

use std::io::Cursor;

use ganglion_proto::job::{self, Background};
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits, Rgb, RgbImage, Rgba};

/// Maximum size of a decoded picture, in bytes.
// 8192 x 8192 pixels of three channels and 16 bits are 403 MB.
const MAX_DECODED_BYTES: u64 = 512 << 20;
/// Maximum decoded size of a small file, in bytes.
const FREE_DECODED_BYTES: u64 = 64 << 20;
/// Maximum ratio of decoded to encoded size beyond that. Deflate reaches 1032, with blank pictures.
const MAX_RATIO: u64 = 1100;

/// Size and orientation of a picture, from its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outline {
    /// Width in pixels, after turning.
    pub(super) width: u32,
    /// Height in pixels, after turning.
    pub(super) height: u32,
    /// Orientation that is applied, as EXIF numbers it; 1 for none.
    pub(super) orientation: u8,
    /// Whether there is an alpha channel.
    pub(super) alpha: bool,
}

/// A decoded picture.
pub(super) struct Decoded {
    pub(super) image: DynamicImage,
    /// Orientation that was applied, as EXIF numbers it; 1 for none.
    pub(super) orientation: u8,
}

/// Reads size and orientation from a file's first bytes. `None` if that takes the whole file.
pub(super) fn outline(bytes: &[u8], length: u64, turn: job::Orientation) -> Option<Result<Outline, String>> {
    let is_whole = bytes.len() as u64 >= length;
    let reader = match reader(bytes) {
        // Nothing was read yet: whether it is a picture is not known.
        Err(_) if !is_whole && bytes.is_empty() => return None,
        Err(wrong) => return Some(Err(wrong)),
        Ok(reader) => reader,
    };
    // In these formats no later byte changes size or orientation.
    let early = matches!(reader.format(), Some(ImageFormat::Jpeg | ImageFormat::Png | ImageFormat::Bmp));
    if !early && !is_whole {
        return None;
    }
    match described(reader, length, turn) {
        // A colour profile or a preview may come first.
        Err(_) if !is_whole => None,
        found => Some(found),
    }
}

fn described(
    reader: ImageReader<Cursor<&[u8]>>,
    length: u64,
    turn: job::Orientation,
) -> Result<Outline, String> {
    let mut decoder = reader.into_decoder().map_err(|error| error.to_string())?;
    // Before anything is allocated for the pixels.
    check_size(&decoder, length)?;
    let orientation = orientation(&mut decoder, turn)?;
    let (width, height) = decoder.dimensions();
    let turned = matches!(
        orientation,
        Orientation::Rotate90
            | Orientation::Rotate270
            | Orientation::Rotate90FlipH
            | Orientation::Rotate270FlipH
    );
    let (width, height) = if turned { (height, width) } else { (width, height) };
    let alpha = decoder.color_type().has_alpha();
    Ok(Outline { width, height, orientation: orientation.to_exif(), alpha })
}

/// Decodes and turns a picture.
pub(super) fn decode(bytes: &[u8], turn: job::Orientation) -> Result<Decoded, String> {
    let reader = reader(bytes)?;
    // The decoder fills missing data with grey and reports nothing.
    if reader.format() == Some(ImageFormat::Jpeg) && !has_end(bytes) {
        return Err("the file is cut off".to_owned());
    }
    let mut decoder = reader.into_decoder().map_err(|error| error.to_string())?;
    // Before the decoder allocates by the size that it claims.
    check_size(&decoder, bytes.len() as u64)?;
    let orientation = orientation(&mut decoder, turn)?;
    let mut image = DynamicImage::from_decoder(decoder).map_err(|error| error.to_string())?;
    image.apply_orientation(orientation);
    Ok(Decoded { image, orientation: orientation.to_exif() })
}

/// Composes a picture with transparent parts over a background. Any other stays as it is.
pub(super) fn over(image: DynamicImage, background: Background) -> DynamicImage {
    let Background::Colour(colour) = background else { return image };
    if !image.color().has_alpha() {
        return image;
    }
    let pixels = image.to_rgba8();
    // Often the channel is there and nothing is transparent: such a picture keeps its bits.
    if pixels.pixels().all(|pixel| pixel[3] == u8::MAX) {
        return image;
    }
    let composed = RgbImage::from_fn(pixels.width(), pixels.height(), |x, y| {
        let Rgba([red, green, blue, alpha]) = *pixels.get_pixel(x, y);
        let alpha = u32::from(alpha);
        let mix = |own: u8, behind: u8| {
            // Whole numbers, to the nearest: the same on all machines.
            let sum = u32::from(own) * alpha + u32::from(behind) * (255 - alpha);
            u8::try_from((sum + 127) / 255).expect("a mean of two bytes")
        };
        Rgb([mix(red, colour[0]), mix(green, colour[1]), mix(blue, colour[2])])
    });
    DynamicImage::from(composed)
}

fn orientation(decoder: &mut impl ImageDecoder, turn: job::Orientation) -> Result<Orientation, String> {
    match turn {
        job::Orientation::Ignore => Ok(Orientation::NoTransforms),
        job::Orientation::Follow => decoder.orientation().map_err(|error| error.to_string()),
    }
}

fn check_size(decoder: &impl ImageDecoder, length: u64) -> Result<(), String> {
    let bytes = decoder.total_bytes();
    // A small file may be a blank picture, which is compressed far more than others.
    let limit = FREE_DECODED_BYTES.max(length.saturating_mul(MAX_RATIO)).min(MAX_DECODED_BYTES);
    if bytes <= limit {
        return Ok(());
    }
    let (width, height) = decoder.dimensions();
    Err(format!(
        "it claims {width} x {height} pixels, {bytes} bytes, more than the {limit} that a picture of its length may have"
    ))
}

fn reader(bytes: &[u8]) -> Result<ImageReader<Cursor<&[u8]>>, String> {
    let mut reader =
        ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(|error| error.to_string())?;
    let mut limits = Limits::default();
    // Also for what a decoder allocates besides the pixels.
    limits.max_alloc = Some(MAX_DECODED_BYTES);
    reader.limits(limits);
    match reader.format() {
        Some(
            ImageFormat::Png | ImageFormat::Jpeg | ImageFormat::WebP | ImageFormat::Bmp | ImageFormat::Tiff,
        ) => Ok(reader),
        // Other formats of the library are off: a GIF or an SVG among the samples is a mistake.
        _ => Err("the content is neither PNG nor JPEG, WebP, BMP or TIFF".to_owned()),
    }
}

/// Whether the last scan of a JPEG file is followed by the end marker. Neither marker can be part of the
/// coded pixels.
fn has_end(bytes: &[u8]) -> bool {
    const START_OF_SCAN: [u8; 2] = [0xff, 0xda];
    const END_OF_IMAGE: [u8; 2] = [0xff, 0xd9];
    // Previews in the metadata have markers of their own: only the last one counts.
    let last_end = bytes.windows(2).rposition(|marker| marker == END_OF_IMAGE);
    last_end.is_some_and(|end| !bytes[end..].windows(2).any(|marker| marker == START_OF_SCAN))
}
