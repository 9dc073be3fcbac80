//! TensorBoard's event files: curves and pictures.
//!
//! An event file is a sequence of TFRecords (TensorFlow, `tsl/lib/io/record_writer.h`), each the length of its data as
//! u64, the masked CRC-32C of that length, the data, and the masked CRC-32C of the data, all little-endian. The data is
//! an `Event` message (TensorFlow, `core/util/event.proto`). Each start of a coordinator begins a new file; TensorBoard
//! reads all of a folder as one run.
//!
//! What was not flushed is lost with the process. `metrics.jsonl` is the record; this is a view.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message;

/// The fields of TensorFlow's `Event` that are written here.
#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
    #[prost(message, optional, tag = "4")]
    image: Option<Image>,
}

#[derive(Clone, PartialEq, Message)]
struct Image {
    #[prost(int32, tag = "1")]
    height: i32,
    #[prost(int32, tag = "2")]
    width: i32,
    #[prost(int32, tag = "3")]
    colorspace: i32,
    #[prost(bytes = "vec", tag = "4")]
    encoded_image_string: Vec<u8>,
}

/// A picture in PNG form, and what TensorBoard wants to know of it beforehand.
#[derive(Clone, Copy, Debug)]
pub struct Png<'a> {
    /// The encoded file.
    pub bytes: &'a [u8],
    /// In pixels.
    pub height: u32,
    /// In pixels.
    pub width: u32,
    /// 1 for grey, 3 for colour.
    pub channels: u32,
}

/// An open event file. Dropping it flushes it, though without telling of errors.
#[derive(Debug)]
pub struct TensorBoard {
    file: BufWriter<File>,
}

impl TensorBoard {
    /// Begins a new event file in `dir`, which is made if need be.
    ///
    /// # Errors
    /// The folder or the file cannot be created.
    pub fn create(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.unwrap_or_default();
        let host = nix::unistd::gethostname().unwrap_or_default();
        let stem = format!(
            "events.out.tfevents.{:010}.{}.{}",
            now.as_secs(),
            host.to_string_lossy(),
            std::process::id()
        );
        let mut board = TensorBoard { file: BufWriter::new(create_numbered(dir, &stem)?) };
        board.write(&Event {
            wall_time: now.as_secs_f64(),
            file_version: Some("brain.Event:2".to_owned()),
            ..Event::default()
        })?;
        board.flush()?;
        Ok(board)
    }

    /// Adds a point to the curve `tag`. `wall_time` is in seconds of Unix time.
    ///
    /// # Errors
    /// The file cannot be written.
    #[expect(clippy::cast_possible_truncation, reason = "TensorBoard's scalars have single precision")]
    pub fn scalar(&mut self, tag: &str, step: u64, wall_time: f64, value: f64) -> io::Result<()> {
        let value = Value { tag: tag.to_owned(), simple_value: Some(value as f32), image: None };
        self.summary(step, wall_time, value)
    }

    /// Adds a picture to the series `tag`. `wall_time` is in seconds of Unix time.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn image_png(&mut self, tag: &str, step: u64, wall_time: f64, image: Png) -> io::Result<()> {
        let side = |pixels: u32| i32::try_from(pixels).unwrap_or(i32::MAX);
        let image = Image {
            height: side(image.height),
            width: side(image.width),
            colorspace: side(image.channels),
            encoded_image_string: image.bytes.to_vec(),
        };
        let value = Value { tag: tag.to_owned(), simple_value: None, image: Some(image) };
        self.summary(step, wall_time, value)
    }

    /// Hands everything to the operating system, so that TensorBoard can see it.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }

    fn summary(&mut self, step: u64, wall_time: f64, value: Value) -> io::Result<()> {
        self.write(&Event {
            wall_time,
            step: i64::try_from(step).unwrap_or(i64::MAX),
            file_version: None,
            summary: Some(Summary { value: vec![value] }),
        })
    }

    fn write(&mut self, event: &Event) -> io::Result<()> {
        self.file.write_all(&record(&event.encode_to_vec()))
    }
}

/// Creates the first file of a name that is free: a coordinator in a container may restart within a second and with the
/// same process id.
fn create_numbered(dir: &Path, stem: &str) -> io::Result<File> {
    for number in 0..u32::MAX {
        match File::create_new(dir.join(format!("{stem}.{number}"))) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => return other,
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

/// Frames data as a TFRecord.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(data.len() + 16);
    record.extend_from_slice(&length);
    record.extend_from_slice(&masked_crc(&length).to_le_bytes());
    record.extend_from_slice(data);
    record.extend_from_slice(&masked_crc(data).to_le_bytes());
    record
}

/// The CRC-32C of some data, turned and shifted as TFRecords want it, so that a checksum of checksums is no weaker.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes an event file apart, checking each checksum.
    fn events(mut bytes: &[u8]) -> Vec<Event> {
        let mut events = Vec::new();
        while !bytes.is_empty() {
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            let length = usize::try_from(length).unwrap();
            assert_eq!(bytes[8..12], masked_crc(&bytes[..8]).to_le_bytes());
            let (data, rest) = bytes[12..].split_at(length);
            assert_eq!(rest[..4], masked_crc(data).to_le_bytes());
            events.push(Event::decode(data).unwrap());
            bytes = &rest[4..];
        }
        events
    }

    /// The bytes that every event file of TensorFlow starts with, apart from the time: a length of 24 and its masked CRC.
    #[test]
    fn the_masked_crc_is_tensorflows() {
        let event =
            Event { wall_time: 1.0, file_version: Some("brain.Event:2".to_owned()), ..Event::default() };
        let record = record(&event.encode_to_vec());
        assert_eq!(record[..8], 24_u64.to_le_bytes());
        assert_eq!(record[8..12], [0xa3, 0x7f, 0x4b, 0x22]);
        // RFC 3720, section B.4: 32 bytes of zeroes.
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
    }

    #[test]
    fn a_file_holds_its_version_and_all_that_was_added() {
        let dir = tempfile::tempdir().unwrap();
        let mut board = TensorBoard::create(dir.path()).unwrap();
        board.scalar("loss/generator", 7, 100.5, 0.0).unwrap();
        let image = Png { bytes: b"not really a PNG", height: 2, width: 3, channels: 1 };
        board.image_png("samples", 7, 101.0, image).unwrap();
        board.flush().unwrap();
        let path = fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        let events = events(&fs::read(path).unwrap());
        assert_eq!(events.len(), 3);
        assert_eq!(events[0].file_version.as_deref(), Some("brain.Event:2"));
        assert_eq!((events[1].step, events[1].wall_time), (7, 100.5));
        let scalar = &events[1].summary.as_ref().unwrap().value[0];
        assert_eq!((scalar.tag.as_str(), scalar.simple_value), ("loss/generator", Some(0.0)));
        let image = events[2].summary.as_ref().unwrap().value[0].image.clone().unwrap();
        assert_eq!((image.height, image.width, image.colorspace), (2, 3, 1));
        assert_eq!(image.encoded_image_string, b"not really a PNG");
    }

    #[test]
    fn each_start_begins_a_new_file() {
        let dir = tempfile::tempdir().unwrap();
        let boards = [(); 3].map(|()| TensorBoard::create(dir.path()).unwrap());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), boards.len());
    }
}
