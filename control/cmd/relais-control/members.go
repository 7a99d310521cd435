package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"slices"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/api"
	"github.com/relais-mta/relais/control/cluster"
	"github.com/relais-mta/relais/control/enroll"
	"github.com/relais-mta/relais/control/service"
	"github.com/relais-mta/relais/shared/buildinfo"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
)

const (
	announcePause        = 200 * time.Millisecond
	endpointsCheckPeriod = time.Second
)

// membership shows the cluster to the use cases in their own words.
type membership struct{ *cluster.Cluster }

// ServerMembers implements service.Membership.
func (m membership) ServerMembers(ctx context.Context) ([]service.ServerMember, error) {
	members, err := m.Members(ctx)
	out := make([]service.ServerMember, 0, len(members))
	for _, one := range members {
		out = append(out, service.ServerMember{ID: one.ID, Voter: one.Voter, Leader: one.Leader, Alive: one.Alive, Lag: one.Lag, Problem: one.Problem})
	}
	return out, err
}

// joining shows the use cases to enrolment of control servers.
type joining struct {
	*service.Service
	kek pki.Key
}

// RedeemServer implements enroll.Servers.
func (j joining) RedeemServer(ctx context.Context, r enroll.Redemption, at enroll.ServerAddresses) (enroll.Member, error) {
	row, err := j.JoinServer(ctx, service.JoinServerRequest{
		RedeemRequest: service.RedeemRequest{TokenID: r.Token, CSRHash: r.CSRHash, Role: string(r.Role), Name: r.Name, RemoteAddr: r.Remote, Version: r.Version},
		RaftAddress:   at.Raft, LinkAddress: at.Link, HTTPAddress: at.HTTP, MaxFSMVersion: at.MaxFSMVersion,
	})
	if err != nil {
		return enroll.Member{}, err
	}
	return enroll.Member{Node: row.ID, State: row.State, SPKI: row.SPKI}, nil
}

// ServerSecrets implements enroll.Servers.
func (j joining) ServerSecrets(ctx context.Context, server ids.Node) (pki.Key, string, error) {
	key, err := j.ServerKey(ctx, server)
	return j.kek, key, err
}

// ServerAddresses implements enroll.Servers.
func (j joining) ServerAddresses() []enroll.ServerAddresses {
	var out []enroll.ServerAddresses
	for _, row := range j.ServerRows() {
		out = append(out, enroll.ServerAddresses{Raft: row.RaftAddress, Link: row.LinkAddress, HTTP: row.HTTPAddress, MaxFSMVersion: row.MaxFSMVersion})
	}
	return out
}

// requests is what other servers may ask this one.
func (s *server) requests() map[string]cluster.PeerHandler {
	return s.quotaRequests(s.sessionRequests(map[string]cluster.PeerHandler{
		"certificate": s.onCertificate,
		"seen": func(context.Context, ids.Node, []byte) (any, error) {
			if svc := s.answering.Load(); svc != nil {
				return svc.AllSeen(), nil
			}
			return nil, fault.Wrap(control.ErrNoLeader, fault.Unavailable, "relais-control.serve", "this server is starting")
		},
	}))
}

// announce tells the cluster how this server is reached and what it runs. While
// there is no leader it tries again.
func (s *server) announce(ctx context.Context) error {
	for {
		err := s.service.AnnounceServer(ctx, s.file.Server, hostPort(s.file.Advertise, s.conf.Listen.Link), hostPort(s.file.Advertise, s.conf.Listen.HTTPS), buildinfo.Version())
		again := errors.Is(err, control.ErrNoLeader) || errors.Is(err, control.ErrOutcomeUnknown) || fault.Is(err, fault.Conflict)
		if err == nil || !again {
			return err
		}
		select {
		case <-time.After(announcePause):
		case <-ctx.Done():
			return nil
		}
	}
}

// keepEndpoints writes the servers of the cluster to cli.toml when they change,
// this one first. A file that is not there stays away: somebody removed it.
func (s *server) keepEndpoints(ctx context.Context) {
	tick := time.NewTicker(endpointsCheckPeriod)
	defer tick.Stop()
	var last []string
	for {
		var now []string
		for _, row := range s.service.ServerRows() {
			endpoint := "https://" + row.HTTPAddress
			if row.ID == s.file.Server {
				now = slices.Insert(now, 0, endpoint)
			} else if row.State == control.NodeActive {
				now = append(now, endpoint)
			}
		}
		if len(now) > 0 && !slices.Equal(now, last) {
			if err := writeEndpoints(s.paths.cli(), now); err != nil {
				s.logger.Warn("the endpoints in cli.toml are not up to date", "error", err)
			}
			last = now
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func writeEndpoints(path string, endpoints []string) error {
	text, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	var f cliFile
	if err == nil {
		err = toml.Unmarshal(text, &f)
	}
	if err != nil || slices.Equal(f.Endpoints, endpoints) {
		return err
	}
	f.Endpoints = endpoints
	return writeTOML(path, f, 0o600)
}

func (a *app) serverCommand() *cobra.Command {
	list := &cobra.Command{Use: "list", Short: "List the control servers", Example: "  relais-control server list", Args: cobra.NoArgs}
	removed := list.Flags().Bool("removed", false, "also those that were removed")
	list.RunE = func(cmd *cobra.Command, _ []string) error {
		return listServers(a, cmd, *removed)
	}
	remove := &cobra.Command{
		Use: "remove SERVER", Short: "Take a control server out of the cluster for good, by id or name",
		Long:    "Take a server out of the cluster for good. It is refused if the servers that remain could not decide anything. Stop the removed server afterwards; to bring its machine back, empty its data directory and join anew.",
		Example: "  relais-control server remove ctl3 --reason 'disk died'", Args: cobra.ExactArgs(1),
	}
	reason, yes := reasonFlag(remove), yesFlag(remove)
	remove.RunE = func(cmd *cobra.Command, args []string) error {
		if err := a.confirm(cmd, *yes, "Server %s is taken out of the cluster for good.", args[0]); err != nil {
			return err
		}
		return show(a, cmd, call{method: http.MethodPost, path: "/servers/" + url.PathEscape(args[0]) + "/remove", reason: *reason}, func(w io.Writer, s api.Server) error {
			_, err := fmt.Fprintln(w, s.ID, "removed")
			return err
		})
	}
	return group("server", "List and remove control servers", list, remove)
}

// commandsText shows a version of the commands, 0 if the server that answers is
// too old to tell.
func commandsText(version uint16) string {
	if version == 0 {
		return ""
	}
	return fmt.Sprint(version)
}

func listServers(a *app, cmd *cobra.Command, removed bool) error {
	return list(a, cmd, "/servers", url.Values{"removed": {fmt.Sprint(removed)}}, "ID NAME STATE ROLE ALIVE LAG VERSION COMMANDS ADDRESS PROBLEM", func(s api.Server) []string {
		return []string{s.ID, s.Name, s.State, s.Role, yes(s.Alive), fmt.Sprint(s.Lag), s.Version, commandsText(s.Commands), s.RaftAddress, s.Problem}
	})
}
