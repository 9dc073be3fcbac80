//! Pictures: sample grids, single images, films.

use std::io::{Cursor, Write};

use ganglion_proto::message::SampleGrid;
use image::{ExtendedColorType, ImageError, ImageFormat};
use tch::{Kind, Tensor};

use super::{SampleError, finite};

/// Gap in pixels between two images of a grid.
const GAP: i64 = 2;

/// Raster of 8-bit pixels, row by row.
pub(crate) struct Picture {
    width: u32,
    height: u32,
    /// Number of channels, 1 or 3.
    channels: u32,
    pixels: Vec<u8>,
}

impl Picture {
    /// Returns one image (c, h, w) in [-1, 1].
    ///
    /// # Errors
    /// The image is not finite.
    pub(crate) fn of(image: &Tensor) -> Result<Picture, SampleError> {
        Ok(Picture::of_levels(&levels(image)?.permute([1, 2, 0])))
    }

    /// Returns a grid of images (n, c, h, w) in [-1, 1], `columns` in a row, black between them.
    ///
    /// # Errors
    /// An image is not finite.
    pub(crate) fn grid(images: &Tensor, columns: i64) -> Result<Picture, SampleError> {
        let [count, channels, height, width] =
            <[i64; 4]>::try_from(images.size()).expect("images have four dimensions");
        // A grid of fewer images than columns is as wide as they are.
        let columns = columns.clamp(1, count.max(1));
        let rows = (count + columns - 1) / columns;
        let blank =
            Tensor::zeros([rows * columns - count, channels, height, width], (Kind::Uint8, images.device()));
        // Empty cells fill the last row.
        // A gap to the left and above each image; the last ones on the right and below come at the end.
        let cells = Tensor::cat(&[levels(images)?, blank], 0).constant_pad_nd([GAP, 0, GAP, 0]);
        let cells = cells.view([rows, columns, channels, height + GAP, width + GAP]);
        let whole = cells.permute([0, 3, 1, 4, 2]).reshape([
            rows * (height + GAP),
            columns * (width + GAP),
            channels,
        ]);
        Ok(Picture::of_levels(&whole.constant_pad_nd([0, 0, 0, GAP, 0, GAP])))
    }

    /// Takes (h, w, c) bytes.
    fn of_levels(levels: &Tensor) -> Picture {
        let small = |at: usize| u32::try_from(levels.size()[at]).expect("a picture is small");
        let pixels = levels.contiguous().flatten(0, -1);
        let pixels = Vec::<u8>::try_from(pixels).expect("a flat tensor of bytes on the CPU");
        Picture { height: small(0), width: small(1), channels: small(2), pixels }
    }

    /// Encodes the picture as a PNG file.
    ///
    /// # Errors
    /// The picture cannot be encoded.
    pub(crate) fn png(&self) -> Result<Vec<u8>, ImageError> {
        let kind = if self.channels == 1 { ExtendedColorType::L8 } else { ExtendedColorType::Rgb8 };
        let mut png = Cursor::new(Vec::new());
        let (pixels, width, height) = (&self.pixels, self.width, self.height);
        image::write_buffer_with_format(&mut png, pixels, width, height, kind, ImageFormat::Png)?;
        Ok(png.into_inner())
    }

    /// Returns the sample grid of a step, as a run keeps it.
    ///
    /// # Errors
    /// The picture cannot be encoded.
    pub(crate) fn of_step(&self, step: u64) -> Result<SampleGrid, ImageError> {
        let Picture { width, height, channels, .. } = *self;
        Ok(SampleGrid { real: false, step, png: self.png()?, width, height, channels })
    }
}

/// Converts [-1, 1] to bytes. NaN has none: it would become a colour like any other.
fn levels(images: &Tensor) -> Result<Tensor, SampleError> {
    let images = finite(images.shallow_clone())?;
    // The inverse of what framing does to bytes, so that a byte survives both.
    Ok(((images + 1.0) * 127.5).round().clamp(0.0, 255.0).to_kind(Kind::Uint8))
}

/// Animated GIF that loops.
pub(crate) struct Film<W: Write> {
    encoder: gif::Encoder<W>,
    size: (u16, u16),
    /// Delay of a frame, in hundredths of a second.
    delay: u16,
}

impl<W: Write> Film<W> {
    /// Begins a film of frames with the size of the first.
    ///
    /// # Errors
    /// The picture is too large for a GIF, or the film cannot be written.
    pub(crate) fn begin(to: W, first: &Picture, delay: u16) -> Result<Film<W>, gif::EncodingError> {
        // The format has 16 bits for a side.
        let side = |pixels: u32| u16::try_from(pixels).map_err(|_| too_large());
        let size = (side(first.width)?, side(first.height)?);
        let greys: Vec<u8> = (0..=255).flat_map(|level| [level; 3]).collect();
        // Grey pictures share one palette, and keep all their levels.
        let palette: &[u8] = if first.channels == 1 { &greys } else { &[] };
        let mut encoder = gif::Encoder::new(to, size.0, size.1, palette)?;
        encoder.set_repeat(gif::Repeat::Infinite)?;
        Ok(Film { encoder, size, delay })
    }

    /// Adds a frame. Its colours are reduced to 256, the limit of a GIF.
    ///
    /// # Errors
    /// The frame cannot be written.
    pub(crate) fn add(&mut self, picture: &Picture) -> Result<(), gif::EncodingError> {
        let (width, height) = self.size;
        let mut frame = match picture.channels {
            1 => gif::Frame {
                width,
                height,
                buffer: picture.pixels.as_slice().into(),
                ..gif::Frame::default()
            },
            _ => gif::Frame::from_rgb_speed(width, height, &picture.pixels, COLOUR_SPEED),
        };
        frame.delay = self.delay;
        self.encoder.write_frame(&frame)
    }

    /// Ends the film.
    ///
    /// # Errors
    /// The film cannot be written.
    pub(crate) fn end(self) -> Result<(), gif::EncodingError> {
        Ok(self.encoder.into_inner()?.flush()?)
    }
}

/// Speed of colour quantisation, from 1, the best colours, to 30, the fastest.
const COLOUR_SPEED: i32 = 10;

fn too_large() -> gif::EncodingError {
    std::io::Error::other("a GIF has at most 65,535 pixels a side").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grid_has_black_between_its_images_and_where_none_is() {
        let images = Tensor::from_slice(&[1.0f32, 0.0, -1.0, 1.0, 1.0, 1.0]).view([3, 1, 1, 2]);
        let picture = Picture::grid(&images, 2).unwrap();
        assert_eq!((picture.width, picture.height), (2 * 2 + 3 * 2, 2 + 3 * 2));
        let row = |y: usize| &picture.pixels[10 * y..10 * (y + 1)];
        assert_eq!(row(2), [0, 0, 255, 128, 0, 0, 0, 255, 0, 0]);
        assert_eq!(row(5), [0, 0, 255, 255, 0, 0, 0, 0, 0, 0]);
        for y in [0, 1, 3, 4, 6, 7] {
            assert_eq!(row(y), [0; 10]);
        }
    }

    #[test]
    fn what_is_not_finite_is_no_picture() {
        for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let image = Tensor::from_slice(&[0.5, wrong, 0.0, 1.0]).view([1, 2, 2]);
            assert!(matches!(Picture::of(&image), Err(SampleError::NotFinite)), "{wrong}");
            let grid = Picture::grid(&image.view([1, 1, 2, 2]), 10);
            assert!(matches!(grid, Err(SampleError::NotFinite)), "{wrong}");
        }
    }

    #[test]
    fn a_png_has_the_colours_of_its_image() {
        let image = Tensor::from_slice(&[-1.0f32, 1.0, 0.0, -1.0, 1.0, 0.0]).view([3, 1, 2]);
        let read = image::load_from_memory(&Picture::of(&image).unwrap().png().unwrap()).unwrap().into_rgb8();
        assert_eq!(read.into_raw(), [0, 128, 255, 255, 0, 128]);
    }

    #[test]
    fn a_film_of_greys_loses_none() {
        let image = Tensor::arange(256, (Kind::Float, tch::Device::Cpu)) / 127.5 - 1.0;
        let first = Picture::of(&image.view([1, 16, 16])).unwrap();
        let second = Picture::of(&(-image).view([1, 16, 16])).unwrap();
        let mut file = Vec::new();
        let mut film = Film::begin(&mut file, &first, 5).unwrap();
        film.add(&first).unwrap();
        film.add(&second).unwrap();
        film.end().unwrap();
        let mut read = gif::DecodeOptions::new().read_info(file.as_slice()).unwrap();
        for wanted in [&first, &second] {
            let frame = read.read_next_frame().unwrap().unwrap();
            assert_eq!((frame.width, frame.height, frame.delay), (16, 16, 5));
            assert_eq!(frame.buffer, wanted.pixels);
        }
        assert!(read.read_next_frame().unwrap().is_none());
    }
}
