//! Descriptions of records, taken from the types themselves: the reference page is made of them.

/// Key of a record.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Name of the key.
    pub name: &'static str,
    /// Rust type of the value.
    pub kind: &'static str,
    /// Documentation.
    pub doc: &'static str,
}

/// Defines a struct whose fields are described by `FIELDS`.
macro_rules! record {
    ($(#[$meta:meta])* pub struct $name:ident {
        $($(#[doc = $doc:literal])* $(#[serde($($serde:tt)*)])? pub $field:ident: $type:ty,)*
    }) => {
        $(#[$meta])*
        pub struct $name {
            $($(#[doc = $doc])* $(#[serde($($serde)*)])? pub $field: $type,)*
        }

        impl $name {
            /// Description of the keys, in order.
            pub const FIELDS: &'static [$crate::record::Field] = &[$($crate::record::Field {
                name: stringify!($field),
                kind: stringify!($type),
                doc: concat!($($doc),*),
            }),*];
        }
    };
}

/// Defines [`RunEvent`](super::RunEvent) with its kinds. A kind is its name, its documentation and
/// its keys: those of a record, or its own.
macro_rules! events {
    (
        records { $($(#[doc = $record_doc:literal])* $record_name:literal $record:ident($type:ident),)* }
        events { $($(#[doc = $doc:literal])* $name:literal $event:ident {
            $($(#[doc = $field_doc:literal])* $(#[serde($($serde:tt)*)])? $field:ident: $field_type:ty,)*
        })* }
    ) => {
        /// Event of a run. A line of `events.jsonl` is its time and the event, whose keys are in
        /// alphabetical order. A key that is missing, as in a line of an earlier version, has its
        /// default; only an evaluation must be whole.
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(tag = "kind")]
        #[expect(clippy::large_enum_variant, reason = "there is one event at a time")]
        pub enum RunEvent {
            $($(#[doc = $record_doc])* #[serde(rename = $record_name)] $record($type),)*
            $($(#[doc = $doc])* #[serde(rename = $name)] $event {
                $($(#[doc = $field_doc])* #[serde(default)] $(#[serde($($serde)*)])? $field: $field_type,)*
            },)*
        }

        /// Kind of an event.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        #[allow(missing_docs)] // those of RunEvent
        pub enum EventKind {
            $($record,)*
            $($event,)*
        }

        impl RunEvent {
            /// Kind of the event.
            pub fn kind(&self) -> EventKind {
                match self {
                    $(RunEvent::$record(..) => EventKind::$record,)*
                    $(RunEvent::$event { .. } => EventKind::$event,)*
                }
            }
        }

        impl EventKind {
            /// All kinds.
            pub const ALL: &'static [EventKind] = &[$(EventKind::$record,)* $(EventKind::$event,)*];

            /// Name, documentation and keys of each kind, in the order of [`EventKind::ALL`].
            const DESCRIBED: &'static [(&'static str, &'static str, &'static [Field])] = &[
                $(($record_name, concat!($($record_doc),*), $type::FIELDS),)*
                $(($name, concat!($($doc),*), &[$(Field {
                    name: stringify!($field),
                    kind: stringify!($field_type),
                    doc: concat!($($field_doc),*),
                }),*]),)*
            ];
        }
    };
}

pub(super) use events;
pub(crate) use record;
