package main

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/wire"
)

// TestAJoinGoesOnWhereOneWasKilled: what a join leaves behind when it is killed
// is no reason to refuse the next; other files are.
func TestAJoinGoesOnWhereOneWasKilled(t *testing.T) {
	t.Parallel()
	for name, refused := range map[string]bool{
		".cli.toml.156765043": false, ".server.toml.7": false, ".ca.pem.12": false, "cli.toml": false, "control.toml": false,
		".cli.toml.bak": true, ".bashrc": true, "backup": true,
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, name), []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
		err := (&joiner{paths: paths{dir}}).claim()
		if (err != nil) != refused || refused && !strings.Contains(err.Error(), name) {
			t.Errorf("with %s: %v", name, err)
		}
		_, left := os.Stat(filepath.Join(dir, name))
		if removed := os.IsNotExist(left); removed != strings.Contains("0123456789", name[len(name)-1:]) {
			t.Errorf("%s: %v", name, left)
		}
	}
}

// TestAJoinWaitsForALeader: a join that a server refuses for want of a leader is
// tried again for as long as other commands are, and no other is.
func TestAJoinWaitsForALeader(t *testing.T) {
	t.Parallel()
	electing := wire.NewError(fault.Wrap(control.ErrNoLeader, fault.Unavailable, "cluster.Propose", "this server does not lead")).Fault()
	down := fault.Wrap(&net.OpError{Op: "dial", Err: errors.New("refused")}, fault.Unavailable, "link.Dial", "nobody answers")
	refused := wire.NewError(fault.New(fault.Denied, "enroll", "the token is unknown")).Fault()
	joined := errors.New("no error")
	for _, tc := range []struct {
		name string
		says []error // in turn, the last for good
		want error
		took time.Duration
	}{
		{"at once", []error{joined}, nil, 0},
		{"when there is a leader again", []error{electing, electing, joined}, nil, 2 * leaderRetryPause},
		{"refused when there is one", []error{electing, refused}, refused, leaderRetryPause},
		{"refused", []error{refused}, refused, 0},
		{"a server that is down", []error{down}, down, 0},
		{"no leader for long", []error{electing}, electing, leaderWait + leaderRetryPause},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				begin, n := time.Now(), 0
				err := whileLeaderless(t.Context(), func() (bool, error) {
					said := tc.says[min(n, len(tc.says)-1)]
					n++
					if said == joined {
						return false, nil
					}
					return saysLeaderless(said), said
				})
				if took := time.Since(begin); err != tc.want || took != tc.took {
					t.Errorf("%v after %s, want %v after %s", err, took, tc.want, tc.took)
				}
			})
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := whileLeaderless(ctx, func() (bool, error) { return true, electing }); err != electing {
		t.Errorf("of a join that was given up: %v", err)
	}
}
