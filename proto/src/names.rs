//! Names of the job's enumerations in its file: those by which serde reads and writes them.

use serde::de::value::{Error, StrDeserializer};
use serde::de::{DeserializeOwned, Deserializer, Visitor};
use serde::forward_to_deserialize_any;

/// Returns the value with a name; `None` if there is none.
pub fn named<T: DeserializeOwned>(name: &str) -> Option<T> {
    T::deserialize(StrDeserializer::<Error>::new(name)).ok()
}

/// Returns the names of all values of an enumeration, in the order of their declaration; none if
/// `T` is no enumeration.
pub fn names_of<T: DeserializeOwned>() -> &'static [&'static str] {
    let mut names: &'static [&'static str] = &[];
    // Ends without a value: the names are all that is asked for.
    let _ = T::deserialize(Asking(&mut names));
    names
}

/// Deserializer without content, which notes the names that it is asked for.
struct Asking<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for Asking<'_> {
    type Error = Error;

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        // Noted before the visitor sees that there is no value.
        *self.0 = variants;
        self.deserialize_any(visitor)
    }

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Error> {
        Err(serde::de::Error::custom("there is no value"))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

/// Implements `Display` for enumerations of the job with their names in its file.
macro_rules! display_as_in_the_file {
    ($($name:ty),* $(,)?) => {$(
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                serde::Serialize::serialize(self, f)
            }
        }
    )*};
}
pub(crate) use display_as_in_the_file;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evaluation::Goal;
    use crate::job::{LossKind, ModelKind, Precision};

    #[test]
    fn each_name_gives_the_value_that_is_shown_by_it() {
        assert_eq!(names_of::<Precision>(), ["fp32", "bf16"]);
        assert_eq!(names_of::<String>(), [""; 0]);
        for name in names_of::<ModelKind>() {
            assert_eq!(named::<ModelKind>(name).map(|kind| kind.to_string()).as_deref(), Some(*name));
        }
        assert_eq!(named::<LossKind>("wgan"), None);
        assert_eq!(names_of::<Goal>(), ["min", "max"]);
    }
}
