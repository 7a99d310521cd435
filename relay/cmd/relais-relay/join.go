package main

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/relais-mta/relais/relay/agent"
	"github.com/relais-mta/relais/relay/config"
	"github.com/relais-mta/relais/relay/egress"
	"github.com/relais-mta/relais/shared/buildinfo"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/telemetry"
)

func newJoin(o *options) *cobra.Command {
	var token, tokenFile, name string
	var labels []string
	cmd := &cobra.Command{
		Use:   "join --token rl1.… ADDRESS…",
		Short: "Make this machine a relay of a cluster",
		Long: "Make this machine a relay of the cluster that the token names. ADDRESS is the relay\n" +
			"link of a control server, host:port, 7443 by default. It can be run again after any\n" +
			"failure; then start the relay with: relais-relay serve --data DIR",
		Example: "  relais-relay join --token rl1.… 203.0.113.5:7443 --data /var/lib/relais/relay\n" +
			"  relais-relay join --token-file /run/token 203.0.113.5 203.0.113.6",
		Args: wrapArgs(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			text, err := readToken(token, tokenFile)
			if err != nil {
				return err
			}
			cfg, err := config.Load(o.config, o.data)
			if err != nil {
				return err
			}
			named, err := parseLabels(labels)
			if err != nil {
				return err
			}
			if name == "" {
				name = hostname(&cfg)
			}
			level, err := telemetry.ParseLevel(cfg.Log.Level)
			if err != nil {
				return err
			}
			result, err := agent.Join(cmd.Context(), agent.JoinOptions{
				Token: text, Servers: withPort(args), Dir: o.data, Name: name, Version: buildinfo.Get().Version,
				Labels: named, Addresses: hostAddresses(&cfg), Names: serverNames(&cfg), Logger: telemetry.NewLogger(os.Stderr, level),
			})
			if err != nil {
				return err
			}
			return printJoin(o, &result)
		},
	}
	cmd.Flags().StringVar(&token, "token", "", "join token made by: relais-control token create --role relay")
	cmd.Flags().StringVar(&tokenFile, "token-file", "", "file that holds the token, so that it does not show in the list of processes")
	cmd.Flags().StringVar(&name, "name", "", "name of the node (default: the host name)")
	cmd.Flags().StringArrayVar(&labels, "label", nil, "label of the node, key=value; may be repeated")
	cmd.Flags().StringVar(&o.config, "config", "", "configuration file (default: relay.toml in the data directory, if there is one)")
	return cmd
}

func readToken(token, file string) (string, error) {
	switch {
	case token != "" && file != "":
		return "", usageError{fmt.Errorf("--token and --token-file exclude each other")}
	case token != "":
		return token, nil
	case file == "":
		return "", usageError{fmt.Errorf("a token is needed: --token rl1.… or --token-file FILE")}
	}
	text, err := os.ReadFile(file)
	return strings.TrimSpace(string(text)), err
}

func parseLabels(pairs []string) (map[string]string, error) {
	out := make(map[string]string, len(pairs))
	for _, p := range pairs {
		key, value, ok := strings.Cut(p, "=")
		if !ok || key == "" {
			return nil, usageError{fmt.Errorf("--label %q is not key=value", p)}
		}
		out[key] = value
	}
	return out, nil
}

// linkPort is where control servers listen for relays.
const linkPort = "7443"

func withPort(addresses []string) []string {
	out := make([]string, len(addresses))
	for i, a := range addresses {
		out[i] = a
		if _, _, err := net.SplitHostPort(a); err != nil {
			out[i] = net.JoinHostPort(strings.Trim(a, "[]"), linkPort)
		}
	}
	return out
}

func hostname(cfg *config.Config) string {
	if cfg.Hostname != "" {
		return cfg.Hostname
	}
	name, err := os.Hostname()
	if err != nil || name == "" {
		return "localhost"
	}
	return name
}

// hostAddresses are the single addresses of this machine, those of its
// listeners included: a listener may use one that no interface lists.
func hostAddresses(cfg *config.Config) []netip.Addr {
	seen := make(map[netip.Addr]bool)
	var out []netip.Addr
	add := func(a netip.Addr) {
		if a = a.Unmap().WithZone(""); a.IsValid() && !a.IsUnspecified() && !seen[a] {
			seen[a] = true
			out = append(out, a)
		}
	}
	if prefixes, err := egress.LocalPrefixes(); err == nil {
		for _, p := range prefixes {
			if p.IsSingleIP() {
				add(p.Addr())
			}
		}
	}
	for _, list := range [][]netip.AddrPort{cfg.Listen.Submissions, cfg.Listen.Submission, cfg.Listen.Inbound} {
		for _, a := range list {
			add(a.Addr())
		}
	}
	return out
}

// serverNames are what the node's certificate is to be good for when the relay
// serves TLS with it.
func serverNames(cfg *config.Config) pki.Request {
	return pki.Request{DNSNames: []string{hostname(cfg)}, Addresses: hostAddresses(cfg)}
}

func printJoin(o *options, r *agent.JoinResult) error {
	if o.json {
		return json.NewEncoder(os.Stdout).Encode(map[string]any{
			"cluster": r.Cluster.String(), "node": r.Node.String(), "state": r.State, "server": r.Server,
			"not_after": r.NotAfter, "already": r.Already,
		})
	}
	verb := "joined"
	if r.Already {
		verb = "had already joined"
	}
	fmt.Printf("This machine %s cluster %s as node %s (%s).\n", verb, r.Cluster, r.Node, r.State)
	if r.State == "pending" {
		fmt.Println("An operator has to accept it before it may work.")
	}
	if s := r.Skew.Abs(); s > 2*time.Second {
		fmt.Printf("Its clock is %v off from the server's: set up NTP.\n", s.Round(time.Millisecond))
	}
	fmt.Printf("Start it with: relais-relay serve --data %s\n", o.data)
	return nil
}
