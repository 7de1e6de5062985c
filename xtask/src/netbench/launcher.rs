//! How an MPI starts one rank on each machine of an emulated cluster and is kept to its network.

use std::path::Path;
use std::process::Command;

use super::cluster::{CARD, Cluster, SUBNET, SWITCH};
use crate::mpi::{Bind, Implementation, Mpi};

/// `mpirun … program` with a rank on each machine, to which the program's arguments can be added.
pub fn command(mpi: &Mpi, cluster: &Cluster, program: &Path) -> Command {
    let mut command = Command::new(&mpi.mpirun);
    let agent = cluster.agent();
    let (args, variables) =
        settings(mpi.implementation, &cluster.addresses(), &agent.to_string_lossy());
    mpi.prepare(&mut command, Bind::None, false);
    // The launcher's own files are gone with the namespaces, too, and meet none of another user's.
    command.args(args).envs(variables).env("TMPDIR", cluster.folder()).arg(program);
    command
}

/// Arguments and environment of the launcher.
fn settings(
    implementation: Implementation,
    addresses: &[&str],
    agent: &str,
) -> (Vec<String>, Vec<(&'static str, String)>) {
    let ranks = addresses.len().to_string();
    let hosts: Vec<String> = addresses.iter().map(|address| format!("{address}:1")).collect();
    let hosts = hosts.join(",");
    let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
    if implementation == Implementation::Hydra {
        // Of MPICH's two ways to messages, UCX and libfabric, a build has one.
        let variables = [
            ("UCX_TLS", "tcp,self"),
            ("UCX_NET_DEVICES", CARD),
            ("FI_PROVIDER", "tcp"),
            ("FI_TCP_IFACE", CARD),
        ];
        let variables = variables.map(|(name, value)| (name, value.to_owned())).to_vec();
        let args = [
            "-launcher",
            "ssh",
            "-launcher-exec",
            agent,
            "-iface",
            SWITCH,
            "-hosts",
            &hosts,
            "-n",
            &ranks,
        ];
        return (words(&args), variables);
    }
    let variables = [
        // Open MPI 4 reads the first, Open MPI 5 (PRRTE) the second.
        ("OMPI_MCA_plm_rsh_agent", agent),
        ("PRTE_MCA_plm_ssh_agent", agent),
        ("OMPI_MCA_oob_tcp_if_include", SUBNET),
        ("PRTE_MCA_prte_if_include", SUBNET),
        // A daemon on every machine is started from here: the others have no agent for their
        // neighbours.
        ("OMPI_MCA_plm_rsh_no_tree_spawn", "1"),
        ("PRTE_MCA_plm_ssh_no_tree_spawn", "1"),
        // Not UCX and not shared memory: sockets.
        ("OMPI_MCA_pml", "ob1"),
        ("OMPI_MCA_btl", "tcp,self"),
        ("OMPI_MCA_btl_tcp_if_include", SUBNET),
    ];
    let variables = variables.map(|(name, value)| (name, value.to_owned())).to_vec();
    (words(&["--quiet", "--host", &hosts, "-n", &ranks]), variables)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_launcher_gets_hosts_and_agent_in_its_own_words() {
        let addresses = ["198.18.0.1", "198.18.0.2"];
        let (args, variables) = settings(Implementation::OpenMpi, &addresses, "/x/agent");
        assert_eq!(args.join(" "), "--quiet --host 198.18.0.1:1,198.18.0.2:1 -n 2");
        assert!(variables.contains(&("OMPI_MCA_plm_rsh_agent", "/x/agent".to_owned())));
        assert!(variables.contains(&("OMPI_MCA_btl", "tcp,self".to_owned())));
        let (args, variables) = settings(Implementation::Hydra, &addresses, "/x/agent");
        let expected = "-launcher ssh -launcher-exec /x/agent -iface switch -hosts 198.18.0.1:1,198.18.0.2:1 -n 2";
        assert_eq!(args.join(" "), expected);
        assert!(
            variables.iter().any(|(name, value)| *name == "UCX_NET_DEVICES" && value == "eth0")
        );
    }
}
