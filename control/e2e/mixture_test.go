package e2e

import (
	"encoding/json"
	"fmt"
	"path/filepath"

	"github.com/relais-mta/relais/shared/lab/fleet"
)

// operate makes changes of every kind an operator knows through one server.
// Whatever release the others run, they must come to the same state by it.
// It returns an address whose relay was put out.
func (u *upgrade) operate(through *fleet.ControlServer) (address string) {
	u.t.Helper()
	u.tags++
	tag := fmt.Sprintf("op%d", u.tags)
	do := func(args ...string) []byte {
		u.t.Helper()
		out, err := u.surely(func() ([]byte, error) { return u.CtlAt(u.t.Context(), through, args...) })
		if err != nil {
			u.t.Errorf("through %s: %v\n%s", through.Name, err, out)
		}
		return out
	}
	made := func(args ...string) (id, text string) {
		u.t.Helper()
		var row struct {
			ID    string `json:"id"`
			Token string `json:"token"`
		}
		if err := json.Unmarshal(do(append(args, "--json")...), &row); err != nil || row.ID == "" {
			u.t.Fatalf("%v: %v", args, err)
		}
		return row.ID, row.Token
	}
	do("tenant", "add", tag, "--reason", "mixture")
	do("project", "add", "shop", "--tenant", tag)
	do("pool", "add", tag, "--tenant", tag)
	do("domain", "add", tag+".test", "--tenant", tag)
	credential, _ := made("credential", "create", "--tenant", tag, "--stream", "bulk")
	do("credential", "rotate", credential, "--overlap", "1h")
	do("credential", "revoke", credential, "--reason", "mixture")
	unused, _ := made("token", "create", "--role", "relay", "--cidr", "127.0.0.0/8", "--label", "a=b", "--approve")
	do("token", "revoke", unused)
	do("policy", "put", u.policyFile("queue", "retry = [\"1s\", \"2s\"]\nretry_max = \"4s\"\ngreylist_retry = \"1s\"\nin_doubt_retry = \"2s\"\nin_doubt_retries = 100\n"))

	// A relay that joins, is given an address, drains and is put out.
	_, join := made("token", "create", "--role", "relay")
	out, err := command(u.t, filepath.Join(u.after.bin, "relais-relay"), "join", "--token", join, "--data", u.t.TempDir(), through.Link(), "--json")
	var joined struct {
		Node string `json:"node"`
	}
	if err == nil {
		err = json.Unmarshal([]byte(out), &joined)
	}
	if err != nil {
		u.t.Fatalf("join: %v\n%s", err, out)
	}
	address = fmt.Sprintf("198.51.100.%d", u.tags)
	do("ip", "add", address, "--ehlo", tag+".example.net", "--pool", tag, "--node", joined.Node)
	do("ip", "override", address, "--reason", "mixture")
	do("node", "drain", joined.Node, "--reason", "mixture")
	do("node", "undrain", joined.Node)
	do("node", "evict", joined.Node, "--reason", "mixture")
	if err := u.WaitApplied(u.t.Context()); err != nil {
		u.t.Fatal(err)
	}
	return address
}
