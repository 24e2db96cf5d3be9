//! What can happen to a protected guest, on real QEMUs under emulation.
//!
//! Each scenario runs on the stable QEMU with the old machine and one processor, and on a newer
//! QEMU with the newer machine and two.

mod deaths;
mod faults;
mod guests;
mod operators;
mod outputs;
mod refusals;
mod stage;

/// One test per kind of QEMU for each scenario of a module.
macro_rules! on_both_qemus {
    ($($(#[$attribute:meta])* $name:ident),* $(,)?) => {
        mod on_7_2_pc {
            $($(#[$attribute])* #[test]
            fn $name() -> anyhow::Result<()> {
                crate::stage::run(stringify!($name), crate::stage::Kind::stable(), super::$name)
            })*
        }
        mod on_10_0_q35 {
            $($(#[$attribute])* #[test]
            fn $name() -> anyhow::Result<()> {
                crate::stage::run(stringify!($name), crate::stage::Kind::newer()?, super::$name)
            })*
        }
    };
}
pub(crate) use on_both_qemus;
