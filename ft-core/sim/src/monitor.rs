//! The primary's QEMU as its monitor shows it: one command after the other, each with its events
//! and its reply, in order.

use crate::primary_host::PrimaryIn;
use crate::vm::{Qmp, QmpOut};
use crate::world::{Event, World};

impl World {
    pub fn on_fence_due(&mut self, number: u32) {
        let same = self.primary.number == number;
        let late = self
            .primary
            .daemon
            .as_ref()
            .is_some_and(|d| d.fence_unanswered && !d.stopped);
        if let Some(vm) = self.primary.vm.as_mut().filter(|_| same && late) {
            vm.frozen = true;
        }
    }

    pub fn qmp(&mut self, command: Qmp) {
        if let Some(vm) = &mut self.primary.vm {
            vm.queue.push_back(command);
            if vm.queue.len() > 64 {
                return self.violation("more than 64 commands wait for QEMU");
            }
            self.schedule_monitor();
        }
    }

    pub fn schedule_monitor(&mut self) {
        let waiting = self
            .primary
            .vm
            .as_ref()
            .is_some_and(|vm| !vm.queue.is_empty());
        if waiting && !std::mem::replace(&mut self.primary.monitor_busy, true) {
            let takes = self.duration(self.params.qmp_us);
            self.after(takes, Event::Monitor);
        }
    }

    /// QEMU carries out one command.
    pub fn on_monitor(&mut self) {
        self.primary.monitor_busy = false;
        let Some(vm) = &mut self.primary.vm else {
            return;
        };
        if vm.frozen {
            // Looked at again: a thawed process goes on where it was.
            self.primary.monitor_busy = true;
            return self.after(1000, Event::Monitor);
        }
        let Some(command) = vm.queue.pop_front() else {
            return;
        };
        let may_fail = !matches!(command, Qmp::FenceStop | Qmp::OpenGate | Qmp::Release(_));
        let failed = may_fail && std::mem::take(&mut self.primary.qmp_fails)
            || command == Qmp::Cont && vm.shut_down;
        if failed {
            self.checks.command_failed = true;
            self.say(QmpOut::Failed(command));
            return self.schedule_monitor();
        }
        match command {
            Qmp::Stop | Qmp::FenceStop => self.stop_guest(),
            Qmp::Cont => self.continue_guest(),
            Qmp::Save => vm.saved = Some(vm.snapshot()),
            Qmp::MoveGate => vm.move_gate(),
            Qmp::CloseGate => vm.gate.closed = true,
            Qmp::OpenGate => {
                let packets = vm.open_gate();
                self.packets_pass(&packets);
            }
            Qmp::Release(_) => {
                let packets = vm.release();
                self.check_released(&packets);
                self.leave(packets);
            }
        }
        self.say(QmpOut::Done(command));
        self.schedule_monitor();
    }

    pub fn stop_guest(&mut self) {
        if let Some(vm) = &mut self.primary.vm
            && std::mem::take(&mut vm.running)
        {
            self.say(QmpOut::StopEvent);
        }
    }

    pub fn continue_guest(&mut self) {
        if let Some(vm) = &mut self.primary.vm
            && !std::mem::replace(&mut vm.running, true)
        {
            self.leave(Vec::new());
            self.say(QmpOut::ResumeEvent);
        }
    }

    fn leave(&mut self, released: Vec<u64>) {
        if let Some(vm) = &mut self.primary.vm {
            let left = vm.leave(released);
            self.note_outside(&left);
        }
    }

    pub fn operator_cont(&mut self) {
        self.checks.operator_cont_at = Some(self.now);
        self.continue_guest();
    }

    pub fn say(&mut self, out: QmpOut) {
        self.primary.said.push_back(out);
        let takes = self.rng.range(5..=60);
        // Replies keep their order: each is read no earlier than the one before.
        self.said_at = self.said_at.max(self.now + takes);
        self.at(self.said_at, Event::Said);
    }

    pub fn on_said(&mut self) {
        if let Some(out) = self.primary.said.pop_front() {
            self.to_primary(3, PrimaryIn::Qmp(out));
        }
    }
}
