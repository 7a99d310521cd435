package main

import (
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/fault"
)

// TestWrongClockIsRefused: a server whose clock is ten minutes off does not
// join, and hears in which direction it is wrong.
func TestWrongClockIsRefused(t *testing.T) {
	for skew, want := range map[time.Duration]string{
		0: "", maxJoinSkew: "", -maxJoinSkew: "",
		10 * time.Minute:           "10m0s ahead of the cluster's",
		-10 * time.Minute:          "10m0s behind the cluster's",
		maxJoinSkew + time.Second:  "ahead of",
		-maxJoinSkew - time.Second: "behind",
	} {
		err := checkSkew(skew)
		if want == "" {
			if err != nil {
				t.Errorf("%s: %v", skew, err)
			}
			continue
		}
		if !fault.Is(err, fault.Denied) || !strings.Contains(fault.Public(err), want) || !strings.Contains(fault.Public(err), "set the clock") {
			t.Errorf("%s: %v", skew, err)
		}
	}
}
