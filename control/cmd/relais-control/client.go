package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/relais-mta/relais/control/api"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/pki"
)

const (
	requestLimit     = 30 * time.Second // for one request to one server
	connectLimit     = 2 * time.Second  // for a connection, and again for its handshake
	hurriedLimit     = 500 * time.Millisecond
	patientLimit     = 10 * time.Second // once no server has answered in less
	leaderWait       = 10 * time.Second // for a cluster that is choosing a leader
	leaderRetryPause = 250 * time.Millisecond
	maxAnswerBytes   = 64 << 20
)

// cliFile is DIR/cli.toml: how to reach the cluster. It holds a key, so only
// its owner may read it.
type cliFile struct {
	Endpoints []string `toml:"endpoints"` // https://host:port of every server
	CAPin     string   `toml:"ca_pin"`    // SHA-256 of the CA's public key, hexadecimal
	Key       string   `toml:"key"`       // API key
}

// client speaks to the management API.
type client struct {
	file     cliFile
	http     *http.Client
	patience atomic.Int64 // nanoseconds, instead of connectLimit
}

// client reads the file that names the cluster.
func (a *app) client() (*client, error) {
	path := a.cliFile
	if path == "" {
		path = os.Getenv("RELAIS_CLI")
	}
	if path == "" {
		path = filepath.Join(a.dataDir, "cli.toml")
	}
	const op = "relais-control"
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, &fault.Error{Kind: fault.NotFound, Op: op, Field: "cli", Public: path + " cannot be read: name the data directory with --data, or the file with --cli or RELAIS_CLI", Cause: err}
	}
	c := &client{}
	c.patience.Store(int64(connectLimit))
	if err := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields().Decode(&c.file); err != nil {
		var unknown *toml.StrictMissingError
		if errors.As(err, &unknown) && len(unknown.Errors) > 0 {
			return nil, fault.Field(op, "cli", "%s is malformed: it has no use for %q, it holds endpoints, ca_pin and key", path, strings.Join(unknown.Errors[0].Key(), "."))
		}
		return nil, &fault.Error{Kind: fault.Invalid, Op: op, Field: "cli", Public: path + " is malformed: it holds endpoints, ca_pin and key", Cause: err}
	}
	raw, err := hex.DecodeString(c.file.CAPin)
	if err != nil || len(raw) != len(pki.Pin{}) || len(c.file.Endpoints) == 0 {
		return nil, fault.Field(op, "cli", "%s is malformed: it holds endpoints, a ca_pin of 64 hexadecimal digits and a key", path)
	}
	for _, endpoint := range c.file.Endpoints {
		// The key goes to whoever is named here: never without TLS.
		if u, err := url.Parse(endpoint); err != nil || u.Scheme != "https" || u.Host == "" || u.Path != "" || u.User != nil {
			return nil, fault.Field(op, "cli", "%s names the endpoint %q: write https://host:port", path, endpoint)
		}
	}
	c.http = &http.Client{Timeout: requestLimit, Transport: &http.Transport{DialTLSContext: c.dialTLS(trust(pki.Pin(raw))), ForceAttemptHTTP2: true}}
	return c, nil
}

// trust accepts a server of the cluster's own CA, or, for a server with a
// bought certificate, one that the system's roots vouch for by name.
func trust(pin pki.Pin) *tls.Config {
	pinned := pki.PinnedClientConfig([]pki.Pin{pin})
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		InsecureSkipVerify: true, // replaced by the check below
		VerifyConnection: func(cs tls.ConnectionState) error {
			err := pinned.VerifyConnection(cs)
			if err == nil || len(cs.PeerCertificates) == 0 {
				return err
			}
			opts := x509.VerifyOptions{DNSName: cs.ServerName, Intermediates: x509.NewCertPool()}
			for _, cert := range cs.PeerCertificates[1:] {
				opts.Intermediates.AddCert(cert)
			}
			if _, publicErr := cs.PeerCertificates[0].Verify(opts); publicErr != nil {
				return fmt.Errorf("%w; and no public CA vouches for it: %w", err, publicErr)
			}
			return nil
		},
	}
}

// call describes one request.
type call struct {
	method, path string
	query        url.Values
	body         any
	ifMatch      string
	reason       string
}

// do sends the request to the servers in turn until one answers, and decodes
// the answer into out. While the cluster is choosing a leader it waits a little.
// When every server is silent it asks once more, with more patience.
func (c *client) do(ctx context.Context, req call, out any) error {
	return whileLeaderless(ctx, func() (bool, error) { return c.tryAll(ctx, req, out) })
}

// whileLeaderless repeats what is asked of the cluster for as long as an answer says
// that it is choosing a leader, up to leaderWait.
func whileLeaderless(ctx context.Context, ask func() (again bool, err error)) error {
	deadline := time.Now().Add(leaderWait)
	for {
		again, err := ask()
		if err == nil || !again || time.Now().After(deadline) {
			return err
		}
		select {
		case <-time.After(leaderRetryPause):
		case <-ctx.Done():
			return err
		}
	}
}

// tryAll asks every server once. retry says that all of them are waiting for a
// leader, or that none heard the request in time, so that nothing was changed and
// asking again can help.
func (c *client) tryAll(ctx context.Context, req call, out any) (retry bool, err error) {
	var unreachable []error
	for _, endpoint := range c.file.Endpoints {
		waits, oneErr := c.once(ctx, endpoint, req, out)
		switch {
		case oneErr == nil:
			return false, nil
		case waits:
			// One of the others may be what the cluster lost. Who answers here knows
			// the new leader soon, so a silent one is not waited for.
			c.patience.Store(int64(hurriedLimit))
			retry, err = true, oneErr
			continue
		case unheard(oneErr), req.method == http.MethodGet && !answered(oneErr) && ctx.Err() == nil:
			unreachable = append(unreachable, oneErr)
			continue
		}
		return false, oneErr
	}
	if len(unreachable) == len(c.file.Endpoints) {
		err = errors.Join(unreachable...)
		// Who took the connection may only be slow, and nobody else is left to ask.
		retry = errors.Is(err, errNoHandshake) && c.patience.Swap(int64(patientLimit)) < int64(patientLimit)
		return retry, fault.Wrap(err, fault.Unavailable, "relais-control", "no control server of this cluster can be reached: is one running?")
	}
	return retry, err
}

// unheard reports whether a server heard nothing of the request.
func unheard(err error) bool {
	var dial *net.OpError
	return errors.As(err, &dial) && dial.Op == "dial" || errors.Is(err, errNoHandshake)
}

// answered reports whether the error is what a server said.
func answered(err error) bool {
	var transport *url.Error
	return !errors.As(err, &transport)
}

// errNoHandshake says that a server took the connection and then kept silent,
// as a stopped process does.
var errNoHandshake = errors.New("no TLS handshake in time")

// dialTLS connects with the bounds that trying the next server needs.
func (c *client) dialTLS(config *tls.Config) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		patience := time.Duration(c.patience.Load())
		conn, err := (&net.Dialer{Timeout: patience}).DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		own := config.Clone()
		own.NextProtos = []string{"h2", "http/1.1"}
		own.ServerName, _, _ = net.SplitHostPort(addr) // addr is what was just dialed
		secured := tls.Client(conn, own)
		limited, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		if err := secured.HandshakeContext(limited); err != nil {
			_ = conn.Close()
			if limited.Err() != nil && ctx.Err() == nil {
				return nil, errNoHandshake
			}
			return nil, err
		}
		return secured, nil
	}
}

func (c *client) once(ctx context.Context, endpoint string, req call, out any) (retry bool, err error) {
	var body io.Reader
	if req.body != nil {
		text, err := json.Marshal(req.body)
		if err != nil {
			return false, err
		}
		body = bytes.NewReader(text)
	}
	target := endpoint + api.Prefix + req.path
	if len(req.query) > 0 {
		target += "?" + req.query.Encode()
	}
	r, err := http.NewRequestWithContext(ctx, req.method, target, body)
	if err != nil {
		return false, err
	}
	r.Header.Set("Authorization", "Bearer "+c.file.Key)
	r.Header.Set("Content-Type", "application/json")
	if req.ifMatch != "" {
		r.Header.Set("If-Match", `"`+req.ifMatch+`"`)
	}
	if req.reason != "" {
		r.Header.Set("Relais-Reason", req.reason)
	}
	resp, err := c.http.Do(r)
	if err != nil {
		return false, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswerBytes))
	if err != nil {
		return false, err
	}
	if resp.StatusCode >= http.StatusBadRequest {
		return refusal(resp.StatusCode, text)
	}
	return false, json.Unmarshal(text, out)
}

// refusal turns a problem document back into an error.
func refusal(status int, text []byte) (retry bool, err error) {
	var p api.Problem
	if err := json.Unmarshal(text, &p); err != nil || p.Detail == "" {
		if status == http.StatusNotFound { // our own refusals say what was not found
			return false, fault.New(fault.Unavailable, "relais-control", "the server does not know this request: it runs an older release than this command line, upgrade it first")
		}
		return false, fault.New(fault.Internal, "relais-control", "the server answered %d %s", status, http.StatusText(status))
	}
	return status == http.StatusServiceUnavailable && p.Retry, errors.New(p.Detail)
}
