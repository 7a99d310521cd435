package main

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/relais-mta/relais/control/cluster"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/config"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/buildinfo"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/link"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/wire"
)

const (
	joinTimeout = 90 * time.Second
	// maxJoinSkew is how far the clocks may differ: certificates are backdated by
	// this much, and a leader's clock stamps what everybody applies.
	maxJoinSkew    = 5 * time.Minute
	maxJoinServers = 16
	csrBlock       = "CERTIFICATE REQUEST"
)

// joinOutput is what join shows.
type joinOutput struct {
	Cluster  string   `json:"cluster"`
	Server   string   `json:"server"`
	Endpoint string   `json:"endpoint"`
	Servers  []string `json:"servers"` // raft addresses of the others
	CLIFile  string   `json:"cli_file"`
}

func (a *app) joinCommand() *cobra.Command {
	var token, tokenFile, advertise, configFile string
	cmd := &cobra.Command{
		Use:   "join --token ct1.… ADDRESS… --data DIR",
		Short: "Make this machine a server of an existing cluster",
		Long: `Join the cluster that made the token: get a certificate, the cluster's
key-encryption key, its CA and the list of its servers, and write them to the
data directory, which must be empty except for a control.toml. Addresses are
those of the relay link of one or more running servers, port 7443 if none is given.

Then start the server with serve. It follows at once and votes when the number
of voters can be odd: the second server waits for the third.

After a failure, run the same command again.`,
		Example: "  relais-control join --token ct1.… 10.0.0.1:7443 --data /var/lib/relais/control --advertise 10.0.0.2",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if token == "" && tokenFile == "" {
				return usagef("--token is missing: make one on a running server with `relais-control token create --role control`")
			}
			if tokenFile != "" {
				text, err := readTokenFile(tokenFile)
				if err != nil {
					return err
				}
				token = text
			}
			conf, err := config.Load(configFile, a.dataDir)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), joinTimeout)
			defer cancel()
			j := &joiner{paths: paths{a.dataDir}, conf: conf, advertise: strings.ToLower(advertise)}
			out, err := j.join(ctx, token, withLinkPort(args))
			if err != nil {
				return err
			}
			if a.json {
				return printJSON(cmd.OutOrStdout(), out)
			}
			return out.print(cmd.OutOrStdout(), a.dataDir)
		},
	}
	cmd.Flags().StringVar(&token, "token", "", "join token, ct1.…")
	cmd.Flags().StringVar(&tokenFile, "token-file", "", "file that holds the token, so that it does not show in the list of processes")
	cmd.MarkFlagsMutuallyExclusive("token", "token-file")
	cmd.Flags().StringVar(&advertise, "advertise", "", "address or host name, without a port, that the others reach this server at (default: the one it reaches them from)")
	cmd.Flags().StringVar(&configFile, "config", "", "configuration file (default: control.toml in the data directory)")
	return cmd
}

func (o joinOutput) print(w io.Writer, dir string) error {
	_, err := fmt.Fprintf(w, "Cluster       %s\nServer        %s\nEndpoint      %s\nServers       %s\nCommand line  %s\n\nStart the server with\n  relais-control serve --data %s\n",
		o.Cluster, o.Server, o.Endpoint, strings.Join(o.Servers, ", "), o.CLIFile, dir)
	return err
}

// maxTokenFileBytes bounds a file that holds a token.
const maxTokenFileBytes = 4 << 10

func readTokenFile(path string) (string, error) {
	const op = "relais-control.join"
	f, err := os.Open(path)
	if err != nil {
		return "", fault.Wrap(err, fault.NotFound, op, "token-file: %s cannot be read", path)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxTokenFileBytes))
	return strings.TrimSpace(string(text)), fault.Wrap(err, fault.Internal, op, "token-file: %s cannot be read", path)
}

// withLinkPort completes addresses that are given without a port.
func withLinkPort(addresses []string) []string {
	port := strconv.Itoa(int(config.Default().Listen.Link.Port()))
	out := slices.Clone(addresses)
	for i, address := range out {
		if _, _, err := net.SplitHostPort(address); err != nil {
			out[i] = net.JoinHostPort(strings.Trim(address, "[]"), port)
		}
	}
	return out
}

// joiner makes a directory a server of a cluster.
type joiner struct {
	paths     paths
	conf      config.Config
	advertise string
	token     pki.JoinToken
	key       *pki.NodeKey
}

func (j *joiner) join(ctx context.Context, text string, addresses []string) (out joinOutput, err error) {
	const op = "relais-control.join"
	if j.token, err = pki.ParseJoinToken(text); err != nil {
		return out, err
	}
	if j.token.Role != pki.RoleControl {
		return out, fault.Field(op, "token", "it lets a relay join (rl1.), this is a control server: make one with relais-control token create --role control")
	}
	if len(addresses) > maxJoinServers {
		return out, fault.Field(op, "address", "name at most %d servers", maxJoinServers)
	}
	for _, address := range addresses {
		if err := link.CheckAddress(address); err != nil {
			return out, err
		}
	}
	if j.advertise != "" {
		if err := checkAdvertise(j.advertise); err != nil {
			return out, err
		}
	}
	if err := j.claim(); err != nil {
		return out, err
	}
	if j.key, err = pki.LoadOrCreateNodeKey(j.paths.nodeKey()); err != nil {
		return out, err
	}
	dialer := link.NewDialer(link.DialerConfig{ResetKey: j.key.Derive("quic stateless reset")})
	defer dialer.Close()
	// The request is the same each time, so that one whose outcome nobody knew costs no
	// second use of the token.
	err = whileLeaderless(ctx, func() (leaderless bool, err error) {
		out, leaderless, err = j.tryAll(ctx, dialer, addresses)
		return leaderless, err
	})
	return out, err
}

// tryAll joins at the first address that lets this server. leaderless says that a
// server would have, had the cluster a leader now.
func (j *joiner) tryAll(ctx context.Context, dialer *link.Dialer, addresses []string) (out joinOutput, leaderless bool, err error) {
	var failures []error
	for _, address := range addresses {
		out, err = j.try(ctx, dialer, address)
		if err == nil || ctx.Err() != nil || fault.Is(err, fault.Denied) || fault.Is(err, fault.Conflict) || fault.Is(err, fault.Invalid) {
			return out, false, err
		}
		leaderless = leaderless || saysLeaderless(err)
		failures = append(failures, err)
	}
	if len(failures) == 1 {
		return out, leaderless, failures[0]
	}
	return out, leaderless, fault.Wrap(errors.Join(failures...), fault.KindOf(failures[0]), "relais-control.join", "no server let this one join")
}

// saysLeaderless reports whether err is a server's word that it may let this one join
// in a few seconds. One that does not answer says nothing.
func saysLeaderless(err error) bool {
	var said *fault.Error
	return errors.As(err, &said) && said.Op == wire.PeerOp && said.Kind == fault.Unavailable
}

// claim makes the directory, which is empty or left from an earlier try.
func (j *joiner) claim() error {
	const op = "relais-control.join"
	if f, err := loadServerFile(j.paths); err == nil {
		return fault.Field(op, "data", "%s is server %s of cluster %s already: start it with serve; to join anew, stop it and empty the directory", j.paths.dir, f.Server, f.Cluster)
	}
	if err := os.MkdirAll(j.paths.identity(), 0o700); err != nil {
		return fault.Wrap(err, fault.Internal, op, "the directory %s cannot be made", j.paths.identity())
	}
	entries, err := os.ReadDir(j.paths.dir)
	if err != nil {
		return fault.Wrap(err, fault.Internal, op, "the directory %s cannot be read", j.paths.dir)
	}
	for _, e := range entries {
		if j.halfWritten(e.Name()) {
			if err := os.Remove(filepath.Join(j.paths.dir, e.Name())); err != nil {
				return fault.Wrap(err, fault.Internal, op, "%s, left from a join that was broken off, cannot be removed", e.Name())
			}
			continue
		}
		if name := e.Name(); !keptByInit(name) && name != filepath.Base(j.paths.identity()) && name != filepath.Base(j.paths.ca()) && name != filepath.Base(j.paths.cli()) {
			return fault.Field(op, "data", "%s is not empty (it holds %s): name an empty directory", j.paths.dir, name)
		}
	}
	return nil
}

// halfWritten reports whether a file is what is left of one that a join was
// writing when it was killed.
func (j *joiner) halfWritten(name string) bool {
	for _, path := range []string{j.paths.ca(), j.paths.cli(), j.paths.server()} {
		if number, ok := strings.CutPrefix(name, "."+filepath.Base(path)+"."); ok && strings.Trim(number, "0123456789") == "" {
			return true
		}
	}
	return false
}

// try joins at one address.
func (j *joiner) try(ctx context.Context, dialer *link.Dialer, address string) (out joinOutput, err error) {
	session, err := dialer.Dial(ctx, address, pki.PinnedClientConfig(j.token.Pins, wire.ALPNJoin))
	if err != nil {
		return out, err
	}
	advertise := j.advertise
	if advertise == "" {
		local, ok := addressTowards(ctx, session.LocalAddr(), session.RemoteAddr())
		if !ok {
			session.Close(link.CodeDone, "")
			return out, fault.Field("relais-control.join", "advertise", "is missing: this machine's own address is not evident")
		}
		advertise = local.String()
	}
	at := &wire.ServerAddresses{Raft: hostPort(advertise, j.conf.Listen.Raft), Link: hostPort(advertise, j.conf.Listen.Link), Http: hostPort(advertise, j.conf.Listen.HTTPS), MaxFsmVersion: uint32(command.FSMVersion)}
	csr, err := j.request(advertise)
	if err != nil {
		return out, err
	}
	name, err := os.Hostname()
	if err != nil || command.CheckName("name", name) != nil {
		name = "server"
	}
	var clusterID ids.Cluster
	reply, err := link.Join(ctx, session, link.JoinRequest{Token: j.token, CSR: csr, Name: name, Version: buildinfo.Version(), Server: at,
		Accept: func(id ids.Cluster, serverTime time.Time) error {
			clusterID = id
			return checkSkew(time.Since(serverTime))
		}})
	if err != nil {
		return out, err
	}
	return j.save(clusterID, advertise, session, reply)
}

// checkSkew refuses to go on with a clock that differs from the cluster's.
func checkSkew(skew time.Duration) error {
	if skew.Abs() <= maxJoinSkew {
		return nil
	}
	direction := "ahead of"
	if skew < 0 {
		direction = "behind"
	}
	return fault.New(fault.Denied, "relais-control.join", "this machine's clock is %s %s the cluster's, allowed are %s: set the clock (with NTP, say) and join again", skew.Abs().Round(time.Second), direction, maxJoinSkew)
}

// request returns the certificate request: the same at each try, so that an
// answer that was lost costs no second use of the token.
func (j *joiner) request(advertise string) ([]byte, error) {
	path := filepath.Join(j.paths.identity(), "node.csr")
	data, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fault.Wrap(err, fault.Internal, "relais-control.join", "%s cannot be read", path)
	}
	if block, _ := pem.Decode(data); block != nil && block.Type == csrBlock {
		if csr, err := pki.ParseCSR(block.Bytes); err == nil && j.key.Private().PublicKey.Equal(csr.PublicKey) {
			return block.Bytes, nil
		}
	}
	csr, err := j.key.CSR(names(advertise, j.conf))
	if err != nil {
		return nil, err
	}
	return csr, pki.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: csrBlock, Bytes: csr}), 0o600)
}

// save checks the grant and writes it; server.toml comes last.
func (j *joiner) save(clusterID ids.Cluster, advertise string, session link.Session, reply *wire.JoinReply) (out joinOutput, err error) {
	const op = "relais-control.join"
	f := serverFile{Format: serverFileFormat, Cluster: clusterID, Advertise: advertise, Raft: hostPort(advertise, j.conf.Listen.Raft)}
	if err := wire.DecodeID(reply.GetNodeId(), &f.Server); err != nil || f.Server.IsZero() || reply.GetServer() == nil {
		return out, fault.New(fault.Invalid, op, "the cluster's answer is not one for a control server: is a release of one server running there? upgrade it first")
	}
	kek, apiKey, err := link.OpenServerSecrets(session, j.token, f.Server, reply.GetServer().GetSecretsSealed())
	if err != nil {
		return out, err
	}
	chain, err := pki.ParseChain(reply.GetChain())
	if err != nil {
		return out, err
	}
	bundle, err := pki.ParseChain(reply.GetBundle())
	if err != nil {
		return out, err
	}
	cli := cliFile{CAPin: j.token.Pins[0].String(), Key: apiKey}
	own := hostPort(advertise, j.conf.Listen.HTTPS)
	cli.Endpoints = append(cli.Endpoints, "https://"+own)
	for _, s := range reply.GetServer().GetServers() {
		if s.GetRaft() != f.Raft {
			f.Peers = append(f.Peers, s.GetRaft())
			cli.Endpoints = append(cli.Endpoints, "https://"+s.GetHttp())
		}
	}
	for _, write := range []func() error{
		func() error { return pki.WriteKey(j.paths.kek(), kek) },
		func() error { return pki.WriteFile(j.paths.leaf(), pki.EncodeCertificates(chain), 0o600) },
		func() error { return pki.WriteFile(j.paths.bundle(), pki.EncodeCertificates(bundle), 0o644) },
		func() error {
			return pki.WriteFile(j.paths.ca(), pki.EncodeCertificates(bundle[len(bundle)-1:]), 0o644)
		},
		func() error { return writeTOML(j.paths.cli(), cli, 0o600) },
		func() error { return writeTOML(j.paths.server(), f, 0o600) },
	} {
		if err := write(); err != nil {
			return out, err
		}
	}
	return joinOutput{Cluster: f.Cluster.String(), Server: f.Server.String(), Endpoint: "https://" + own, Servers: f.Peers, CLIFile: j.paths.cli()}, nil
}

// attach makes a server that has joined follow, if it does not yet.
func (s *server) attach(ctx context.Context) error {
	addresses := append([]string(nil), s.file.Peers...)
	for _, row := range s.service.ServerRows() {
		addresses = append(addresses, row.RaftAddress)
	}
	err := s.cluster.Attach(ctx, addresses)
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// checkPeer tells the raft port which servers to refuse.
func checkPeer(st *state.Store) func(string, ids.Node) error {
	return func(dialed string, server ids.Node) error { return cluster.CheckServer(st, dialed, server) }
}
