// Package buildinfo says which build is running, so that logs, metrics, the
// link's greeting and "--version" all tell the same.
package buildinfo

import (
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
)

// version is set by the linker for releases:
//
//	go build -ldflags "-X github.com/relais-mta/relais/shared/buildinfo.version=v1.2.3"
var version string

// Info describes a build.
type Info struct {
	Version  string `json:"version"`            // "v1.2.3", a pseudo-version, or "devel"
	Revision string `json:"revision,omitempty"` // of the source, if it was known
	Modified bool   `json:"modified,omitempty"` // the source had changes that were not committed
	Time     string `json:"time,omitempty"`     // of the revision, RFC 3339
	Go       string `json:"go"`
	Platform string `json:"platform"` // "linux/amd64"
}

// Get returns the description of the running binary.
var Get = sync.OnceValue(func() Info {
	build, _ := debug.ReadBuildInfo()
	return describe(version, build)
})

// describe joins what the linker and the Go tool left in the binary; build may
// be nil.
func describe(linked string, build *debug.BuildInfo) Info {
	info := Info{Version: linked, Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
	if build != nil {
		if v := build.Main.Version; info.Version == "" && v != "" && v != "(devel)" {
			info.Version = v
		}
		for _, s := range build.Settings {
			switch s.Key {
			case "vcs.revision":
				info.Revision = s.Value
			case "vcs.modified":
				info.Modified = s.Value == "true"
			case "vcs.time":
				info.Time = s.Value
			}
		}
	}
	if info.Version == "" {
		info.Version = "devel"
	}
	return info
}

// Version returns the version alone.
func Version() string { return Get().Version }

// String returns one line, such as "v1.2.3 (1a2b3c4d5e6f, go1.26.0, linux/amd64)".
func (i Info) String() string {
	const shownRevision = 12
	var parts []string
	if r := i.Revision; r != "" {
		if len(r) > shownRevision {
			r = r[:shownRevision]
		}
		if i.Modified {
			r += " with changes"
		}
		parts = append(parts, r)
	}
	return i.Version + " (" + strings.Join(append(parts, i.Go, i.Platform), ", ") + ")"
}
