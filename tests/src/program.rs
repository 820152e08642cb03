//! Programs loaded for BPF_PROG_TEST_RUN: a packet and its context in, a verdict, a packet and counters out.

use std::{env, fs, path::PathBuf};

use anyhow::{Context, Result};
use aya::{
    Ebpf,
    maps::{Array, HashMap},
    programs::{CgroupSkb, SchedClassifier, TestRun, TestRunOptions, TestRunResult},
};
use qjump::{
    dataplane::{Maps, OBJECT, OLD_OBJECT, has_compare_exchange, object},
    tag::cgroup::Hierarchy,
};
use qjump_ebpf::{Config, LEVELS, Reason, grant::Grant, layout::LevelCounters, names};

/// "Next": the packet passes, and other programs still run (TC_ACT_UNSPEC).
pub const NEXT: i32 = -1;
/// The packet is dropped (TC_ACT_SHOT).
pub const DROP: i32 = 2;

/// The fields of `struct __sk_buff` (include/uapi/linux/bpf.h) that BPF_PROG_TEST_RUN takes and gives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SkBuff {
    /// `skb->priority`.
    pub priority: u32,
    /// `skb->wire_len`; 0 stands for the packet's length.
    pub wire_len: u32,
    /// `skb->gso_segs`.
    pub gso_segs: u32,
    /// `skb->gso_size`.
    pub gso_size: u32,
}

const SK_BUFF: usize = 192;
const PRIORITY: usize = 32;
const WIRE_LEN: usize = 160;
const GSO_SEGS: usize = 164;
const GSO_SIZE: usize = 176;

impl SkBuff {
    /// A single packet of this priority.
    pub fn priority(priority: u32) -> Self {
        Self { priority, ..Self::default() }
    }

    fn to_bytes(self) -> [u8; SK_BUFF] {
        let mut bytes = [0; SK_BUFF];
        for (at, value) in
            [(PRIORITY, self.priority), (WIRE_LEN, self.wire_len), (GSO_SEGS, self.gso_segs), (GSO_SIZE, self.gso_size)]
        {
            bytes[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        }
        bytes
    }

    fn from_bytes(bytes: &[u8; SK_BUFF]) -> Self {
        let field = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        Self {
            priority: field(PRIORITY),
            wire_len: field(WIRE_LEN),
            gso_segs: field(GSO_SEGS),
            gso_size: field(GSO_SIZE),
        }
    }
}

/// What one run gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The program's verdict.
    pub action: i32,
    /// The packet afterwards.
    pub packet: Vec<u8>,
    /// The context afterwards.
    pub context: SkBuff,
}

/// The egress program and its maps, on no interface.
pub struct Shim {
    object: Ebpf,
    maps: Maps,
}

/// The objects that this kernel takes, and for which kernels they are.
pub fn objects() -> Vec<(&'static str, &'static [u8])> {
    let mut objects = vec![("for old kernels", OLD_OBJECT)];
    if has_compare_exchange() {
        objects.push(("for others", OBJECT));
    }
    objects
}

/// Loads the program `name` of the lab object, which `cargo xtask` has built.
pub fn lab(name: &str) -> Result<Ebpf> {
    let built = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/bpf/lab.o");
    let path = env::var_os("QJUMP_LAB_OBJECT").map_or_else(built, PathBuf::from);
    let object = fs::read(&path).with_context(|| format!("{} is not there; run `cargo xtask test`", path.display()))?;
    let mut lab = Ebpf::load(&object)?;
    classifier(&mut lab, name)?.load()?;
    Ok(lab)
}

/// The program `name` of `object`.
pub fn classifier<'a>(object: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier> {
    Ok(object.program_mut(name).with_context(|| format!("no program {name}"))?.try_into()?)
}

/// Runs a program `repeat` times on one packet: verdict and mean time, ns.
pub fn time(
    program: &impl for<'a> TestRun<Opts<'a> = TestRunOptions<'a>, Result = TestRunResult>,
    packet: &[u8],
    context: SkBuff,
    repeat: u32,
) -> Result<(i32, u64)> {
    let result = program.test_run(TestRunOptions {
        data_in: Some(packet),
        ctx_in: Some(&context.to_bytes()),
        repeat,
        ..TestRunOptions::new()
    })?;
    Ok((result.return_value as i32, result.duration.as_nanos() as u64))
}

impl Shim {
    /// Loads it with this configuration in force.
    pub fn load(config: &Config) -> Result<Self> {
        Self::of_object(object()?, config)
    }

    /// Loads one of the objects that there are for older and newer kernels.
    pub fn of_object(object: &[u8], config: &Config) -> Result<Self> {
        let mut object = Ebpf::load(object)?;
        classifier(&mut object, names::PROGRAM)?.load()?;
        let mut maps = Maps::of(&mut object)?;
        maps.initialise(config)?;
        Ok(Self { object, maps })
    }

    /// Grants this process's cgroup a level, as far as this program's own maps go.
    pub fn grant(&mut self, level: u32) -> Result<()> {
        let own = Hierarchy::find()?.of_process(None)?.id;
        let mut grants: HashMap<_, u64, Grant> = self.object.map_mut(names::GRANTS).context("no grants")?.try_into()?;
        grants.insert(own, Grant { level, ..Grant::default() }, 0)?;
        let mut generation: Array<_, u64> =
            self.object.map_mut(names::GENERATION).context("no generation")?.try_into()?;
        generation.set(0, 1, 0)?;
        Ok(())
    }

    /// The program that gives each packet of a granted socket its level.
    pub fn skb_level(&mut self) -> Result<&CgroupSkb> {
        let program: &mut CgroupSkb =
            self.object.program_mut(names::SKB_LEVEL).context("no program for packets")?.try_into()?;
        if program.fd().is_err() {
            program.load()?;
        }
        Ok(program)
    }

    /// The maps.
    pub fn maps(&mut self) -> &mut Maps {
        &mut self.maps
    }

    /// The program, and the maps for who changes them meanwhile.
    pub fn parts(&mut self) -> Result<(&SchedClassifier, &mut Maps)> {
        Ok((classifier(&mut self.object, names::PROGRAM)?, &mut self.maps))
    }

    /// The program.
    pub fn program(&mut self) -> Result<&SchedClassifier> {
        classifier(&mut self.object, names::PROGRAM).map(|program| &*program)
    }

    /// What the program has counted so far.
    pub fn counters(&self) -> Result<[LevelCounters; LEVELS]> {
        Ok(self.maps.counters()?)
    }

    /// The counters that are not 0: (level, reason, packets, bytes).
    pub fn counted(&self) -> Result<Vec<(usize, Reason, u64, u64)>> {
        let counters = self.counters()?;
        Ok((0..LEVELS)
            .flat_map(|level| Reason::ALL.map(|reason| (level, reason, counters[level].reasons[reason.index()])))
            .filter(|(.., count)| count.packets > 0)
            .map(|(level, reason, count)| (level, reason, count.packets, count.bytes))
            .collect())
    }

    /// Runs the program once.
    pub fn run(&mut self, packet: &[u8], context: SkBuff) -> Result<Outcome> {
        let mut data_out = vec![0; packet.len() + 64];
        let mut context_out = [0; SK_BUFF];
        let result = self.program()?.test_run(TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut data_out),
            ctx_in: Some(&context.to_bytes()),
            ctx_out: Some(&mut context_out),
            ..TestRunOptions::new()
        })?;
        data_out.truncate(result.data_size_out as usize);
        Ok(Outcome { action: result.return_value as i32, packet: data_out, context: SkBuff::from_bytes(&context_out) })
    }
}
