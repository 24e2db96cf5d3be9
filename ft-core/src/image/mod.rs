//! Layout of an epoch image.
