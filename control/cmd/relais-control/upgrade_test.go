package main

import (
	"net/http"
	"strings"
	"testing"
)

// TestOlderServerIsNamed: during an upgrade a new command line may ask an old
// server, which has no words for what it does not know.
func TestOlderServerIsNamed(t *testing.T) {
	for text, want := range map[string]string{
		"404 page not found\n": "upgrade it first",
		`{"detail":"server: there is no server \"x\"","status":404}`: `there is no server "x"`,
	} {
		if retry, err := refusal(http.StatusNotFound, []byte(text)); retry || err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, %v", text, retry, err)
		}
	}
	if commandsText(0) != "" || commandsText(3) != "3" {
		t.Error("a version that is not told is shown, or one that is told is not")
	}
}
