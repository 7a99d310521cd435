package queue

import (
	"flag"
	"os"
	"testing"
)

// TestMain gives the model tests fewer but longer runs, since each one opens
// a data directory; -rapid.checks and -rapid.steps on the command line win.
func TestMain(m *testing.M) {
	if os.Getenv(crashChild) != "" {
		os.Exit(crashMain())
	}
	flag.Parse()
	set := map[string]bool{}
	flag.Visit(func(f *flag.Flag) { set[f.Name] = true })
	for name, value := range map[string]string{"rapid.checks": "8", "rapid.steps": "80"} {
		if set[name] {
			continue
		}
		if err := flag.Set(name, value); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}
