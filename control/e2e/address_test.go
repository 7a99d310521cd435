package e2e

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab/fleet"
)

// TestAddressMovesUnderMail takes an address from a relay that sends from it and
// gives it to another: that waits until the first has said that it stopped, and
// all mail arrives once. Then it goes back from a machine that is off.
func TestAddressMovesUnderMail(t *testing.T) {
	f := start(t, fleet.Config{Relays: 2, Open: true, NoDKIM: true})
	from, to := f.Relays[0], f.Relays[1]
	address := from.Sources[0].String()
	type row struct {
		State string `json:"state"`
		Node  string `json:"node"`
		Epoch uint64 `json:"epoch"`
	}
	show := func() (got row) {
		t.Helper()
		var rows []struct {
			Bind string `json:"bind"`
			row
		}
		if err := json.Unmarshal([]byte(ctl(t, f, "ip", "list", "--json")), &rows); err != nil {
			t.Fatal(err)
		}
		for _, r := range rows {
			if r.Bind == address {
				got = r.row
			}
		}
		return got
	}
	before := show()
	if before.Node != from.Node || before.State != "assigned" {
		t.Fatalf("the address is %+v", before)
	}
	submitted, err := f.Submit(within(t, time.Minute), fleet.Stream{Recipients: recipients(t, f, 300), Size: 2000, Connections: 8, Tag: "moving"})
	if err != nil {
		t.Fatal(err)
	}
	refusedCtl(t, f, "release it with", "ip", "assign", address, "--node", to.Node)
	ctl(t, f, "ip", "release", address, "--reason", "moves")
	eventually(t, 45*time.Second, "the relay says that it has stopped", func() bool { return show().State == "free" })
	ctl(t, f, "ip", "assign", address, "--node", to.Node)
	moved := show()
	if moved.State != "assigned" || moved.Node != to.Node || moved.Epoch <= before.Epoch {
		t.Errorf("the address was %+v and is %+v", before, moved)
	}
	if a := settle(t, f, submitted); a.refused > 0 || a.delivered != len(submitted) {
		t.Errorf("of %d messages: %+v", len(submitted), a)
	}
	for i := range submitted {
		if n := f.Lab.Deliveries(submitted[i].MessageID, submitted[i].Recipient); n != 1 {
			t.Errorf("%s was delivered %d times", submitted[i].MessageID, n)
		}
	}

	to.Kill()
	ctl(t, f, "ip", "reassign", address, "--node", from.Node, "--force", "--machine-is-off", "--reason", "burnt")
	if back := show(); back.State != "assigned" || back.Node != from.Node || back.Epoch <= moved.Epoch {
		t.Errorf("the address was %+v and is %+v", moved, back)
	}
	if err := f.RestartUnready(within(t, time.Minute), to); err != nil {
		t.Fatal(err)
	}
	submitted, err = f.Submit(within(t, time.Minute), fleet.Stream{Recipients: recipients(t, f, 20), Size: 2000, Connections: 2, Tag: "back", Only: from})
	if err != nil {
		t.Fatal(err)
	}
	if a := settle(t, f, submitted); a.refused > 0 || a.delivered != len(submitted) {
		t.Errorf("of %d messages: %+v", len(submitted), a)
	}
}
