//! Writer and reader of TensorBoard's event files: curves and pictures.
//!
//! An event file is a sequence of TFRecords (TensorFlow, `tsl/lib/io/record_writer.h`), each the length of
//! its data as u64, the masked CRC-32C of that length, the data, and the masked CRC-32C of the data, all
//! little-endian. The data is an `Event` message (TensorFlow, `core/util/event.proto`). Each start of a
//! coordinator begins a new file; TensorBoard reads all of a folder as one run.
//!
//! 1. Records that were not flushed are lost with the process: `metrics.jsonl` is the record, this
//!    is a view.
//! 2. A record is in a file as a whole or not at all: one that a death or a full disk cut is removed.
//!    No reader finds anything behind a damaged record, so everything from it on is cut off.

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Write};
use std::path::Path;

use ganglion_proto::clock;
use prost::Message;

/// Prefix of the names of event files.
const PREFIX: &str = "events.out.tfevents.";
/// Overhead of a record, in bytes: a length, and two checksums.
const FRAME: u64 = 16;
/// Size at which buffered records are handed to the system, in bytes.
const BUFFER: usize = 64 << 10;
/// Maximum number of bytes that wait for the disk. The next coordinator draws the rest.
// A view is not worth more memory on a full disk.
const UNWRITTEN_LIMIT: usize = 16 << 20;

/// Fields of TensorFlow's `Event` that are written here.
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

/// An encoded PNG with the properties that TensorBoard requires.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Png<'a> {
    /// Content of the PNG file.
    pub bytes: &'a [u8],
    /// Height in pixels.
    pub height: u32,
    /// Width in pixels.
    pub width: u32,
    /// Number of channels: 1 for grey, 3 for colour.
    pub channels: u32,
}

impl<'a> Png<'a> {
    /// Reads the properties from the header of a PNG; `None` if it is not one.
    pub(crate) fn of(bytes: &'a [u8]) -> Option<Png<'a>> {
        let header = bytes.strip_prefix(b"\x89PNG\r\n\x1a\n")?.get(8..18)?;
        let side = |at: usize| Some(u32::from_be_bytes(header.get(at..at + 4)?.try_into().ok()?));
        let channels = if matches!(header.get(9)?, 0 | 4) { 1 } else { 3 };
        Some(Png { bytes, width: side(0)?, height: side(4)?, channels })
    }
}

/// An open event file.
#[derive(Debug)]
pub(crate) struct TensorBoard {
    file: File,
    /// Whole records that are not in the file yet.
    unwritten: Vec<u8>,
    /// Length of the whole records in the file, in bytes.
    end: u64,
    /// Whether the file may end in a part of a record.
    is_torn: bool,
}

impl TensorBoard {
    /// Begins a new event file in `dir`, which is created if necessary.
    ///
    /// # Errors
    /// The folder or the file cannot be created.
    pub(crate) fn create(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let now = clock::unix_time();
        // Named as by TensorBoard's own writers: the time comes first, so the order of names is that of
        // starts.
        let host = nix::unistd::gethostname().unwrap_or_default();
        let stem = format!("{PREFIX}{:010}.{}.{}", now.as_secs(), host.to_string_lossy(), std::process::id());
        let file = create_numbered(dir, &stem)?;
        let mut board = TensorBoard { file, unwritten: Vec::new(), end: 0, is_torn: false };
        board.write(&Event {
            wall_time: now.as_secs_f64(),
            // The first record of each file, by which readers know the format.
            file_version: Some("brain.Event:2".to_owned()),
            ..Event::default()
        });
        // A full disk is reported by the next flush.
        let _ = board.flush();
        Ok(board)
    }

    /// Reads the event files in `dir`, which have no writer any more: `visit` is called with the
    /// step and the tag of each point and picture. Torn or damaged ends are cut off.
    ///
    /// # Errors
    /// A file cannot be read.
    pub(crate) fn read_back(dir: &Path, mut visit: impl FnMut(u64, &str)) -> io::Result<()> {
        let entries = match fs::read_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        for entry in entries {
            let path = entry?.path();
            let is_ours = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(PREFIX));
            if is_ours && path.is_file() {
                read_file(&path, &mut visit)?;
            }
        }
        Ok(())
    }

    /// Adds points to curves, by their tags, as one record. `wall_time` is in seconds of Unix time.
    #[expect(clippy::cast_possible_truncation, reason = "TensorBoard's scalars have single precision")]
    pub(crate) fn scalars(&mut self, step: u64, wall_time: f64, points: Vec<(String, f64)>) {
        let value =
            |(tag, value): (String, f64)| Value { tag, simple_value: Some(value as f32), image: None };
        self.summary(step, wall_time, points.into_iter().map(value).collect());
    }

    /// Adds a picture to the series `tag`. `wall_time` is in seconds of Unix time.
    pub(crate) fn image_png(&mut self, tag: &str, step: u64, wall_time: f64, image: Png) {
        let side = |pixels: u32| i32::try_from(pixels).unwrap_or(i32::MAX);
        let image = Image {
            height: side(image.height),
            width: side(image.width),
            colorspace: side(image.channels),
            encoded_image_string: image.bytes.to_vec(),
        };
        let value = Value { tag: tag.to_owned(), simple_value: None, image: Some(image) };
        self.summary(step, wall_time, vec![value]);
    }

    /// Hands all records to the operating system, so that TensorBoard can see them.
    ///
    /// # Errors
    /// The file cannot be written. The remaining records wait for the next flush, up to a limit.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        let written = self.cut().and_then(|()| self.file.write_all(&self.unwritten));
        self.wrote(written)
    }

    /// Cuts off the part of a record that a failed write may have left.
    fn cut(&mut self) -> io::Result<()> {
        if self.is_torn {
            self.file.set_len(self.end)?;
            self.is_torn = false;
        }
        Ok(())
    }

    /// Notes the result of writing all that was unwritten.
    fn wrote(&mut self, written: io::Result<()>) -> io::Result<()> {
        if let Err(error) = written {
            self.is_torn = true;
            // No reader gets past half a record, so it goes at once (2); else before the next write.
            let _ = self.cut();
            if self.unwritten.len() > UNWRITTEN_LIMIT {
                self.unwritten.clear();
            }
            return Err(error);
        }
        self.end += self.unwritten.len() as u64;
        self.unwritten.clear();
        Ok(())
    }

    /// Records that are not in the file yet.
    #[cfg(test)]
    pub(super) fn unwritten(&self) -> &[u8] {
        &self.unwritten
    }

    fn summary(&mut self, step: u64, wall_time: f64, value: Vec<Value>) {
        self.write(&Event {
            wall_time,
            step: i64::try_from(step).unwrap_or(i64::MAX),
            file_version: None,
            summary: Some(Summary { value }),
        });
    }

    fn write(&mut self, event: &Event) {
        self.unwritten.extend_from_slice(&record(&event.encode_to_vec()));
        if self.unwritten.len() > BUFFER {
            // An error shows again at the next flush.
            let _ = self.flush();
        }
    }
}

/// Visits the records of a file, and cuts off an unreadable end.
fn read_file(path: &Path, visit: &mut impl FnMut(u64, &str)) -> io::Result<()> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    let mut reader = BufReader::with_capacity(BUFFER, file);
    let mut good = 0;
    while let Some(data) = next_record(&mut reader, length - good)? {
        // Valid checksums and not an event: not ours, and nothing behind it can be trusted either.
        let Ok(event) = Event::decode(data.as_slice()) else { break };
        let step = u64::try_from(event.step).unwrap_or(0);
        event.summary.iter().flat_map(|summary| &summary.value).for_each(|value| visit(step, &value.tag));
        good += data.len() as u64 + FRAME;
    }
    if good < length {
        File::options().write(true).open(path)?.set_len(good)?;
    }
    Ok(())
}

/// Data of the next record; `None` at the end, and where no valid record follows.
fn next_record(reader: &mut impl Read, left: u64) -> io::Result<Option<Vec<u8>>> {
    if left < FRAME {
        return Ok(None);
    }
    let mut head = [0; 12];
    reader.read_exact(&mut head)?;
    let (length, crc) = head.split_at(8);
    let claimed = u64::from_le_bytes(length.try_into().expect("it is eight bytes"));
    // The length has a checksum of its own: a damaged one must not ask for gigabytes.
    if crc != masked_crc(length).to_le_bytes() || claimed > left - FRAME {
        return Ok(None);
    }
    let mut data = vec![0; usize::try_from(claimed).unwrap_or(0)];
    let mut crc = [0; 4];
    reader.read_exact(&mut data)?;
    reader.read_exact(&mut crc)?;
    Ok((crc == masked_crc(&data).to_le_bytes()).then_some(data))
}

/// Creates the first file of an unused name: a coordinator in a container may restart within a
/// second and with the same process id. The file grows record by record: a reader stops at a torn
/// one, and the next coordinator has a new file.
fn create_numbered(dir: &Path, stem: &str) -> io::Result<File> {
    for number in 0..u32::MAX {
        // Appending: after a record was cut off, the next one begins at the new end, and not behind it.
        match File::options().append(true).create_new(true).open(dir.join(format!("{stem}.{number}"))) {
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

/// Masked CRC-32C: rotated and shifted as TFRecords require, so that a checksum of checksums is no weaker.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parses an event file, verifying each checksum.
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

    /// The first bytes of every event file of TensorFlow, apart from the time: a length of 24 and
    /// its masked CRC.
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
        board.scalars(7, 100.5, vec![("loss/generator".to_string(), 0.0), ("b".to_string(), 2.0)]);
        let image = Png { bytes: b"not really a PNG", height: 2, width: 3, channels: 1 };
        board.image_png("samples", 7, 101.0, image);
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

    /// Invariant 2, for a write of which only a part found room.
    #[test]
    fn what_follows_a_record_that_a_full_disk_cut_can_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let mut board = TensorBoard::create(dir.path()).unwrap();
        board.scalars(1, 1.0, vec![("a".to_string(), 0.5)]);
        let half = board.unwritten[..board.unwritten.len() / 2].to_vec();
        board.file.write_all(&half).unwrap();
        assert!(board.wrote(Err(io::ErrorKind::StorageFull.into())).is_err());
        assert_eq!(board.file.metadata().unwrap().len(), board.end);
        // The part could not be cut off either.
        board.file.write_all(&half).unwrap();
        board.is_torn = true;
        board.scalars(2, 1.0, vec![("a".to_string(), 0.5)]);
        board.flush().unwrap();
        let path = fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        let steps: Vec<i64> = events(&fs::read(path).unwrap()).iter().map(|event| event.step).collect();
        assert_eq!(steps, [0, 1, 2]);
    }

    #[test]
    fn each_start_begins_a_new_file() {
        let dir = tempfile::tempdir().unwrap();
        let boards = [(); 3].map(|()| TensorBoard::create(dir.path()).unwrap());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), boards.len());
    }

    /// Invariant 2.
    #[test]
    fn a_torn_or_damaged_tail_is_cut_and_the_rest_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut board = TensorBoard::create(dir.path()).unwrap();
        let header = board.end;
        for step in 1..=3 {
            board.scalars(step, 1.0, vec![("a".to_string(), 0.5), ("b".to_string(), 0.5)]);
        }
        board.flush().unwrap();
        let path = fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        let whole = fs::read(&path).unwrap();
        let read = || {
            let mut points = Vec::new();
            TensorBoard::read_back(dir.path(), |step, tag| points.push((step, tag.to_string()))).unwrap();
            points
        };
        assert_eq!(read().len(), 6);
        let record = usize::try_from((board.end - header) / 3).unwrap();
        let last = whole.len() - record;
        for length in last..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            assert_eq!(read().last().unwrap(), &(2, "b".to_string()), "cut at {length}");
            assert!(fs::read(&path).unwrap() == whole[..last]);
        }
        for at in last - record..last {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            fs::write(&path, &damaged).unwrap();
            assert_eq!(read(), [(1, "a".to_string()), (1, "b".to_string())], "damaged at {at}");
            assert!(fs::read(&path).unwrap() == whole[..last - record]);
        }
    }

    #[test]
    fn the_header_of_a_picture_tells_its_size() {
        let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x03\0\0\0\x02\x08\0".to_vec();
        let of = |png: &[u8]| Png::of(png).map(|png| (png.width, png.height, png.channels));
        assert_eq!(of(&png), Some((3, 2, 1)));
        *png.last_mut().unwrap() = 2;
        assert_eq!(of(&png), Some((3, 2, 3)));
        assert_eq!(of(b"GIF"), None);
    }
}
