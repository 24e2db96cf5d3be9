//! The plug with vhost-net between two hosts of the lab, each with a kernel of its own.

mod comes_back;
mod lab;
mod powered_off;
