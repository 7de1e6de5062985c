//! An emulated cluster: network namespaces, each with a host name, an address and a link to one
//! bridge.
//!
//! This runs as root of a network namespace of its own, which is the switch and the place of the
//! launcher. A machine is a namespace that one waiting process keeps; without names in the file
//! system there is nothing to clean up.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

/// 198.18.0.0/15 is set aside for benchmarks of networks (RFC 2544): no real network has these
/// addresses.
pub const SUBNET: &str = "198.18.0.0/24";
/// The switch's own name and address, where the launcher runs.
pub const SWITCH: &str = "switch";
const SWITCH_ADDRESS: &str = "198.18.0.254/24";
/// The network card of each machine.
pub const CARD: &str = "eth0";

/// A link of each machine.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Net {
    /// Speed in each direction.
    pub gbit: f64,
    /// Delay of a packet, where the kernel can do that.
    pub delay_us: Option<u32>,
}

/// Machines on a switch.
pub struct Cluster {
    machines: Vec<Machine>,
    folder: PathBuf,
}

struct Machine {
    keeper: Child,
    address: String,
}

impl Cluster {
    /// As many machines, each on one of `cores` in turn: ranks that share a core share it on
    /// purpose. `folder` is for files.
    pub fn build(size: usize, cores: &[usize], net: Net, folder: PathBuf) -> Result<Cluster> {
        let mut cluster = Cluster { machines: Vec::new(), folder };
        run(&["ip", "link", "set", "lo", "up"])?;
        run(&["ip", "link", "add", SWITCH, "type", "bridge"])?;
        run(&["ip", "addr", "add", SWITCH_ADDRESS, "dev", SWITCH])?;
        run(&["ip", "link", "set", SWITCH, "up"])?;
        for index in 0..size {
            let machine =
                Machine { keeper: keeper(index)?, address: format!("198.18.0.{}", index + 1) };
            let process = machine.keeper.id().to_string();
            // Kept by the cluster from now on, also if the rest fails.
            cluster.machines.push(machine);
            for line in wiring(index, &process, net) {
                run(&line.iter().map(String::as_str).collect::<Vec<_>>())?;
            }
        }
        cluster.write_agent(cores)?;
        Ok(cluster)
    }

    /// The addresses of the machines.
    pub fn addresses(&self) -> Vec<&str> {
        self.machines.iter().map(|machine| &*machine.address).collect()
    }

    /// The folder for files.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The program that a launcher starts in place of `ssh`.
    pub fn agent(&self) -> PathBuf {
        self.folder.join("agent")
    }

    /// Takes a machine, counted from 0, off the network.
    pub fn cut(&self, machine: usize) -> Result<()> {
        run(&["ip", "link", "set", &port(machine), "down"])
    }

    /// Bytes that the machines have sent so far, as the switch saw them.
    pub fn traffic(&self) -> Result<u64> {
        received(&fs::read_to_string("/proc/net/dev").context("cannot read /proc/net/dev")?)
    }

    fn write_agent(&self, cores: &[usize]) -> Result<()> {
        let hosts: Vec<(&str, u32, usize)> = self
            .machines
            .iter()
            .zip(cores.iter().cycle())
            .map(|(machine, &core)| (&*machine.address, machine.keeper.id(), core))
            .collect();
        let path = self.agent();
        fs::write(&path, agent_script(&hosts))
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for Machine { keeper, .. } in &mut self.machines {
            keeper.kill().ok();
            keeper.wait().ok();
        }
        // The kernel removes the machines' ends, and with them these, a moment later; a next
        // cluster must not meet them.
        for index in 0..self.machines.len() {
            run(&["ip", "link", "del", &port(index)]).ok();
        }
        run(&["ip", "link", "del", SWITCH]).ok();
    }
}

/// The process that keeps the namespaces of a machine. Its host name matters: by it MPI, and by MPI
/// `comm`, tell machines apart. They would take the machine for one with shared memory otherwise,
/// since there is one kernel below all.
fn keeper(index: usize) -> Result<Child> {
    let script = "hostname \"$0\" && echo ready && exec cat";
    let mut command = Command::new("unshare");
    command.args(["--net", "--uts", "sh", "-c", script, &format!("node{}", index + 1)]);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start unshare")?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("unshare has no output")?).read_line(&mut line)?;
    if line != "ready\n" {
        child.kill().ok();
        child.wait()?;
        bail!("cannot make the namespaces of machine {}", index + 1);
    }
    Ok(child)
}

fn port(index: usize) -> String {
    format!("port{}", index + 1)
}

/// The commands that connect a machine, whose keeper is `process`, with the switch.
fn wiring(index: usize, process: &str, net: Net) -> Vec<Vec<String>> {
    let port = port(index);
    let rate = format!("{}kbit", (net.gbit * 1e6).round());
    let burst = burst(net.gbit).to_string();
    let mut lines = vec![
        format!("ip link add {port} type veth peer name {CARD} netns {process}"),
        format!("ip link set {port} master {SWITCH} up"),
    ];
    let there = format!("nsenter --target {process} --net");
    lines.push(format!("{there} ip link set lo up"));
    lines.push(format!("{there} ip addr add 198.18.0.{}/24 dev {CARD}", index + 1));
    lines.push(format!(
        "{there} tc qdisc add dev {CARD} root tbf rate {rate} burst {burst} latency 100ms"
    ));
    // The delay is put on the other end, so that neither limit has to know the other.
    lines.extend(
        net.delay_us
            .map(|us| format!("tc qdisc add dev {port} root netem delay {us}us limit 100000")),
    );
    lines.push(format!("{there} ip link set {CARD} up"));
    lines.iter().map(|line| line.split(' ').map(str::to_owned).collect()).collect()
}

/// Bytes that may pass at once: two packets, or what 25 µs bring at high speeds, where timers are
/// coarser than packets. More would let the messages of a decoded token through as if the link had
/// no limit.
fn burst(gbit: f64) -> u64 {
    ((gbit * 1e9 / 8.0 * 25e-6) as u64).max(3_200)
}

/// Starts a command on a machine as `ssh [options] address words` would: in its namespaces, on its
/// core.
fn agent_script(hosts: &[(&str, u32, usize)]) -> String {
    let mut script = String::from(
        "#!/bin/sh\nwhile case $1 in -*) true ;; *) false ;; esac; do shift; done\ncase $1 in\n",
    );
    for (address, process, core) in hosts {
        script += &format!("{address}) process={process} core={core} ;;\n");
    }
    script += "*) echo \"netbench: there is no machine $1\" >&2; exit 1 ;;\nesac\nshift\n";
    script + "exec nsenter --target $process --net --uts taskset -c $core sh -c \"$*\"\n"
}

/// The bytes that the switch's ports received, from the kernel's table of interfaces.
fn received(table: &str) -> Result<u64> {
    let ports = table
        .lines()
        .filter_map(|line| line.trim().split_once(':'))
        .filter(|(name, _)| name.starts_with("port"));
    let bytes = ports.map(|(name, rest)| {
        let first = rest.split_whitespace().next().and_then(|number| number.parse::<u64>().ok());
        first.with_context(|| format!("/proc/net/dev has no bytes for {name}"))
    });
    bytes.sum()
}

/// The cores that this process may use.
pub fn cores() -> Vec<usize> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let list =
        status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap_or("0");
    core_list(list.trim()).unwrap_or_else(|| vec![0])
}

/// The numbers of a list like `0-3,8`.
fn core_list(list: &str) -> Option<Vec<usize>> {
    let mut cores = Vec::new();
    for range in list.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        cores.extend(first.parse::<usize>().ok()?..=last.parse::<usize>().ok()?);
    }
    Some(cores)
}

/// Makes `folder` one that only this namespace sees and that is gone with it: a run that is killed
/// leaves no files.
pub fn own_folder(folder: &Path) -> Result<()> {
    run(&["mount", "-t", "tmpfs", "netbench", &folder.to_string_lossy()])
}

/// Whether this kernel can delay packets.
pub fn can_delay() -> bool {
    let added = run(&["tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "20us"]).is_ok();
    added && run(&["tc", "qdisc", "del", "dev", "lo", "root"]).is_ok()
}

fn run(words: &[&str]) -> Result<()> {
    let mut command = Command::new(words[0]);
    let output =
        command.args(&words[1..]).env("PATH", super::search_path()).stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("cannot start {}", words[0]))?;
    if !output.status.success() {
        bail!("{}: {}", words.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_wired_inside_of_its_own_namespace() {
        let lines: Vec<String> = wiring(1, "77", Net { gbit: 2.5, delay_us: Some(20) })
            .iter()
            .map(|line| line.join(" "))
            .collect();
        assert_eq!(lines[0], "ip link add port2 type veth peer name eth0 netns 77");
        assert!(
            lines.contains(
                &"nsenter --target 77 --net ip addr add 198.18.0.2/24 dev eth0".to_owned()
            )
        );
        let limit = "nsenter --target 77 --net tc qdisc add dev eth0 root tbf rate 2500000kbit burst 7812 latency 100ms";
        assert!(lines.contains(&limit.to_owned()), "{lines:?}");
        assert!(
            lines.contains(&"tc qdisc add dev port2 root netem delay 20us limit 100000".to_owned())
        );
        let without = wiring(1, "77", Net { gbit: 1.0, delay_us: None });
        assert!(!without.iter().flatten().any(|word| word == "netem"));
    }

    #[test]
    fn bursts_hold_a_packet_at_any_speed() {
        assert_eq!([0.01, 1.0, 10.0, 25.0].map(burst), [3_200, 3_200, 31_250, 78_125]);
    }

    #[test]
    fn the_agent_passes_words_on_and_knows_its_machines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent");
        let script = agent_script(&[("198.18.0.1", 4242, 3)]).replace("exec nsenter", "echo");
        fs::write(&path, script).unwrap();
        let said = |args: &[&str]| {
            let output = Command::new("sh").arg(&path).args(args).output().unwrap();
            (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
        };
        let expected = "--target 4242 --net --uts taskset -c 3 sh -c orted -x 'a b'\n";
        assert_eq!(said(&["-x", "198.18.0.1", "orted", "-x 'a b'"]), (true, expected.to_owned()));
        assert_eq!(said(&["198.18.0.9", "orted"]), (false, String::new()));
    }

    #[test]
    fn the_switch_counts_what_its_ports_receive() {
        let table = "Inter-|   Receive\n face |bytes    packets\n    lo:    9 1 0\n port1:  100 2 0 0\nport2: 23 1 0\nswitch: 7 1\n";
        assert_eq!(received(table).unwrap(), 123);
        assert!(received("port1: x").is_err());
    }

    #[test]
    fn lists_of_cores() {
        assert_eq!(core_list("0-2,8"), Some(vec![0, 1, 2, 8]));
        assert_eq!(core_list("5"), Some(vec![5]));
        assert_eq!(core_list(""), None);
    }
}
