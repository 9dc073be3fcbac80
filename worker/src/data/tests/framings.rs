//! Resizing and cutting, by the settings of a job.

use super::*;

fn framed(resize: Option<u32>, crop: Option<u32>) -> Result<DataSet, DataError> {
    DataSet::open(&Data { resize, crop, ..Data::bundled_digits() })
}

#[test]
fn crop_follows_resize() {
    for (resize, crop, side) in
        [(Some(32), None, 32), (Some(14), None, 14), (Some(32), Some(24), 24), (None, Some(20), 20)]
    {
        let dataset = framed(resize, crop).unwrap();
        assert_eq!(shape(&dataset), ImageShape { channels: 1, height: side, width: side });
        assert!(read(&dataset, 7).iter().all(|pixel| (-1.0..=1.0).contains(pixel)));
    }
}

#[test]
fn a_resize_to_the_same_size_changes_nothing() {
    let (whole, same) = (framed(None, None).unwrap(), framed(Some(28), None).unwrap());
    assert_eq!(read(&whole, 3), read(&same, 3));
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    assert_says(&refusal(framed(Some(0), None)), &["data.resize = 0", "set it from 1 to 8192"]);
    assert_says(&refusal(framed(None, Some(9000))), &["data.crop = 9000", "set it from 1 to 8192"]);
    let message = refusal(framed(Some(24), Some(28)));
    assert_says(&message, &["data.crop = 28", "data.resize = 24", "set data.crop to at most 24"]);
    let message = refusal(framed(None, Some(32)));
    assert_says(&message, &["bundled digits", "28 x 28", "data.crop = 32", "at most 28"]);
}
