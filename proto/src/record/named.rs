//! Ordered lists of named values.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde::{Serialize, Serializer};
use serde_json::Value;

use super::row::Profile;

/// Values by name, in a fixed order. An object in JSON, where a number that is not finite is null.
#[derive(Clone, Debug, PartialEq)]
pub struct Named<T>(Vec<(String, T)>);

/// Scalars of a step or of an evaluation. Which ones there are is the objective's matter.
pub type Scalars = Named<f64>;
/// Time profiles of a step by the names of its phases.
pub type Profiles = Named<Profile>;

/// Value that is read from JSON; `None` for a value of another kind.
trait Cell: Sized {
    fn read(value: Value) -> Option<Self>;
}

impl Cell for f64 {
    fn read(value: Value) -> Option<f64> {
        // JSON has no NaN and no infinity, which are written as null.
        if value.is_null() { Some(f64::NAN) } else { value.as_f64() }
    }
}

impl Cell for Profile {
    fn read(value: Value) -> Option<Profile> {
        serde_json::from_value(value).ok()
    }
}

impl<T> Default for Named<T> {
    fn default() -> Self {
        Named(Vec::new())
    }
}

impl<T> Named<T> {
    /// Names and values, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, T)>
    where
        T: Copy,
    {
        self.0.iter().map(|(name, value)| (name.as_str(), *value))
    }

    /// The value of a name.
    pub fn get(&self, name: &str) -> Option<T>
    where
        T: Copy,
    {
        self.iter().find(|(known, _)| *known == name).map(|(_, value)| value)
    }

    /// The same values, ordered by name.
    pub fn sorted(mut self) -> Self {
        self.0.sort_by(|(one, _), (other, _)| one.cmp(other));
        self
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<T, N: Into<String>> FromIterator<(N, T)> for Named<T> {
    fn from_iter<I: IntoIterator<Item = (N, T)>>(values: I) -> Self {
        Named(values.into_iter().map(|(name, value)| (name.into(), value)).collect())
    }
}

impl<T: Serialize> Serialize for Named<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}

impl<'de, T: Cell> Deserialize<'de> for Named<T> {
    /// Reads an object. Values of another kind are left out: they are of another version.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object<T>(PhantomData<T>);
        impl<'de, T: Cell> Visitor<'de> for Object<T> {
            type Value = Named<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Named<T>, A::Error> {
                let mut values = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, Value>()? {
                    // A value of another type belongs to a key of a later version, and is passed over.
                    values.extend(T::read(value).map(|value| (name, value)));
                }
                Ok(Named(values))
            }
        }
        deserializer.deserialize_map(Object(PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_keeps_its_order_and_what_is_not_finite_is_null() {
        let scalars: Scalars = [("b", 0.1 + 0.2), ("a", f64::NAN), ("c", 3.0)].into_iter().collect();
        let text = serde_json::to_string(&scalars).unwrap();
        assert_eq!(text, r#"{"b":0.30000000000000004,"a":null,"c":3.0}"#);
        let read: Scalars = serde_json::from_str(&text).unwrap();
        assert_eq!(serde_json::to_string(&read).unwrap(), text);
        assert!(read.get("a").is_some_and(f64::is_nan) && read.get("d").is_none());
    }

    #[test]
    fn what_is_no_number_is_of_another_version() {
        let read: Scalars = serde_json::from_str(r#"{"a":"x","b":[1],"c":2}"#).unwrap();
        assert_eq!(read, [("c", 2.0)].into_iter().collect());
    }
}
