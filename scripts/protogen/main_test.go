package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const sample = `syntax = "proto3";
package sample;
import "google/protobuf/timestamp.proto";
option go_package = "example.test/sample";
// Letter is what is sent.
message Letter {
  string to = 1;
  google.protobuf.Timestamp sent = 2;
}
`

// tree makes a module that has the repository's pinned tools and one .proto.
func tree(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	for _, name := range []string{"go.mod", "go.sum"} {
		content, err := os.ReadFile(filepath.Join("..", "..", name))
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(root, name), string(content))
	}
	write(t, filepath.Join(root, "sample", "sample.proto"), sample)
	return root
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestGenerateThenCheck(t *testing.T) {
	root, ctx := tree(t), context.Background()
	if err := run(ctx, root, true); err == nil || !strings.Contains(err.Error(), "sample/sample.pb.go: missing") {
		t.Fatalf("check before generating: %v", err)
	}
	if err := run(ctx, root, false); err != nil {
		t.Fatal(err)
	}
	generated := filepath.Join(root, "sample", "sample.pb.go")
	content, err := os.ReadFile(generated)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"// Letter is what is sent.", "type Letter struct", "timestamppb.Timestamp"} {
		if !strings.Contains(string(content), want) {
			t.Errorf("generated code lacks %q", want)
		}
	}
	if err := run(ctx, root, true); err != nil {
		t.Fatalf("check after generating: %v", err)
	}
	write(t, generated, strings.Replace(string(content), "Letter is what", "Letter was what", 1))
	if err := run(ctx, root, true); err == nil || !strings.Contains(err.Error(), "sample.pb.go:") || !strings.Contains(err.Error(), "differs") {
		t.Fatalf("check of an edited file: %v", err)
	}
	write(t, filepath.Join(root, "old", "old.pb.go"), "package old\n")
	if err := run(ctx, root, true); err == nil || !strings.Contains(err.Error(), "old/old.pb.go: has no .proto") {
		t.Fatalf("check with a left-over file: %v", err)
	}
}

func TestSyntaxErrorNamesTheLine(t *testing.T) {
	root := tree(t)
	write(t, filepath.Join(root, "sample", "sample.proto"), "syntax = \"proto3\";\nmessage {\n")
	if err := run(context.Background(), root, false); err == nil || !strings.Contains(err.Error(), "sample.proto:2:") {
		t.Fatalf("got %v", err)
	}
}
