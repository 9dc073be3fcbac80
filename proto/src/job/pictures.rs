//! How pictures become samples: settings of section `[data]`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::names::display_as_in_the_file;

/// Treatment of the orientation in a picture's EXIF data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Orientation {
    /// The picture is turned and mirrored as viewers do.
    #[default]
    Follow,
    /// The picture stays as its pixels are stored.
    Ignore,
}

impl Orientation {
    pub(super) fn is_followed(&self) -> bool {
        *self == Orientation::Follow
    }
}

/// Way in which a scaled picture becomes a square.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fit {
    /// The shorter side is scaled to the size, and the central square is cut out.
    #[default]
    Crop,
    /// The longer side is scaled to the size, and the rest of the square is filled with the background.
    Pad,
}

impl Fit {
    pub(super) fn is_crop(&self) -> bool {
        *self == Fit::Crop
    }
}

/// Order of folders, by which classes get their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClassOrder {
    /// Numbers in names count as numbers: 2 before 10.
    Natural,
    /// Names are compared as bytes: 10 before 2.
    Bytes,
}

display_as_in_the_file!(Orientation, Fit, ClassOrder);

/// Colour behind the transparent parts of pictures. Its text is `stored`, `white`, `black` or `#rrggbb`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Background {
    /// The colour that a picture has stored under its transparent parts, which viewers never show.
    Stored,
    /// Red, green and blue.
    Colour([u8; 3]),
}

impl Background {
    /// White, on which viewers and web pages show pictures.
    pub const WHITE: Background = Background::Colour([255; 3]);
    /// Black.
    pub const BLACK: Background = Background::Colour([0; 3]);
}

/// Error: the text is no background.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be \"white\", \"black\", a colour such as \"#20a0ff\", or \"stored\"")]
pub struct NoBackground;

impl FromStr for Background {
    type Err = NoBackground;

    fn from_str(text: &str) -> Result<Background, NoBackground> {
        match text {
            "stored" => return Ok(Background::Stored),
            "white" => return Ok(Background::WHITE),
            "black" => return Ok(Background::BLACK),
            _ => {}
        }
        let digits = text.strip_prefix('#').filter(|digits| digits.len() == 6).ok_or(NoBackground)?;
        // `from_str_radix` takes a sign as well.
        if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(NoBackground);
        }
        let [_, red, green, blue] = u32::from_str_radix(digits, 16).map_err(|_| NoBackground)?.to_be_bytes();
        Ok(Background::Colour([red, green, blue]))
    }
}

impl TryFrom<String> for Background {
    type Error = NoBackground;

    fn try_from(text: String) -> Result<Background, NoBackground> {
        text.parse()
    }
}

impl From<Background> for String {
    fn from(background: Background) -> String {
        background.to_string()
    }
}

impl fmt::Display for Background {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Background::Stored => f.write_str("stored"),
            Background::WHITE => f.write_str("white"),
            Background::BLACK => f.write_str("black"),
            Background::Colour([red, green, blue]) => write!(f, "#{red:02x}{green:02x}{blue:02x}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_background_is_read_as_it_is_shown() {
        for text in ["stored", "white", "black", "#20a0ff"] {
            assert_eq!(text.parse::<Background>().unwrap().to_string(), text);
        }
        assert_eq!("#FFFFFF".parse(), Ok(Background::WHITE));
        for text in ["", "red", "#fff", "#+20a0f", "#20a0fé", "20a0ff"] {
            assert_eq!(text.parse::<Background>(), Err(NoBackground), "{text}");
        }
    }
}
